-- Keep a lease. KEYS: lease. ARGV: owner, milliseconds.
-- Returns which life of the server this is (another one after each restart), or false when the lease is another's or has
-- run out.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return false
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')

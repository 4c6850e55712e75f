-- Keep a lease. KEYS: lease. ARGV: owner, milliseconds. Returns 1, or 0 when it is another's or has run out.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1

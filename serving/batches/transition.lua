-- Move a batch to another status, if it is in one of those given and, where an owner is given, that one holds the lease
-- in the same life of the server: what it wrote before a restart may be gone, and what it read is not to be built on.
-- KEYS: batch, lease. ARGV: owner or '', life, statuses it may have (blank-separated), new status, then fields and
-- values. Returns the status it had, or false where there is no such batch; 'lost' when the lease is another's,
-- 'restarted' in another life.
if ARGV[1] ~= '' then
  if redis.call('GET', KEYS[2]) ~= ARGV[1] then
    return 'lost'
  elseif string.match(redis.call('INFO', 'server'), 'run_id:(%w+)') ~= ARGV[2] then
    return 'restarted'
  end
end
local status = redis.call('HGET', KEYS[1], 'status')
if not status then
  return false
end
for allowed in string.gmatch(ARGV[3], '%S+') do
  if allowed == status then
    redis.call('HSET', KEYS[1], 'status', ARGV[4], unpack(ARGV, 5))
    break
  end
end
return status

-- Move a batch to another status, if it is in one of those given and, where an owner is given, that one holds the lease.
-- KEYS: batch, lease. ARGV: owner or '', statuses it may have (blank-separated), new status, then fields and values.
-- Returns the status it had, or false where there is no such batch; 'lost' when the lease is another's.
if ARGV[1] ~= '' and redis.call('GET', KEYS[2]) ~= ARGV[1] then
  return 'lost'
end
local status = redis.call('HGET', KEYS[1], 'status')
if not status then
  return false
end
for allowed in string.gmatch(ARGV[2], '%S+') do
  if allowed == status then
    redis.call('HSET', KEYS[1], 'status', ARGV[3], unpack(ARGV, 4))
    break
  end
end
return status

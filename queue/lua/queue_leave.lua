-- A consumer goes: without its lease the others adopt what it has not finished.
-- KEYS: the stream of each class, the lease.  ARGV: group, consumer.
local group, consumer = ARGV[1], ARGV[2]
redis.call('DEL', KEYS[#KEYS])
for k = 1, #KEYS - 1 do
  if #redis.call('XPENDING', KEYS[k], group, '-', '+', 1, consumer) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[k], group, consumer)
  end
end

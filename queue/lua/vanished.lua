-- Take the lease from replicas whose process is gone: its heartbeat is late, and its connection is closed.
-- ARGV: namespace, what a lease has left at least when its heartbeat is not late (ms), ids
-- Returns their ids. None where the server has just started: nobody is connected yet.
local ns, least = ARGV[1], tonumber(ARGV[2])
local uptime = string.match(redis.call('INFO', 'server'), 'uptime_in_seconds:(%d+)')
local vanished = {}
for i = 3, #ARGV do
  local lease = ns .. 'replica:' .. ARGV[i]
  local listening = redis.call('PUBSUB', 'NUMSUB', ns .. 'alive:' .. ARGV[i])[2]
  if tonumber(uptime) >= 5 and listening == 0 and redis.call('PTTL', lease) < least then
    redis.call('DEL', lease)
    vanished[#vanished + 1] = ARGV[i]
  end
end
return vanished

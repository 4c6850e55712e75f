-- Finish entries: acknowledge, delete, uncount; with a reason, keep a copy in the dead letters.
-- KEYS: the stream of each class in order of rank, the token counters, the dead letters.
-- ARGV: group, reason ('' for none), [rank, id, tokens]...  Returns how many were still there.
local group, reason = ARGV[1], ARGV[2]
local counters, dead = KEYS[#KEYS - 1], KEYS[#KEYS]
local settled = 0
for k = 3, #ARGV, 3 do
  local rank, id, tokens = ARGV[k], ARGV[k + 1], ARGV[k + 2]
  local stream = KEYS[rank + 1]
  if reason ~= '' then
    local entry = redis.call('XRANGE', stream, id, id)[1]
    if entry then redis.call('XADD', dead, '*', 'reason', reason, unpack(entry[2])) end
  end
  redis.call('XACK', stream, group, id)
  if redis.call('XDEL', stream, id) == 1 then
    redis.call('HINCRBY', counters, rank, -tokens)
    settled = settled + 1
  end
end
return settled

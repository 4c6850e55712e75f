-- Cancel requests wherever they are: on the broker (the dispatcher will find the mark) or in a replica (its inbox).
-- ARGV: namespace, lifetime (ms), msgpack array of ids, final (optional, 1: the request can never be revived).
-- Returns how many had not ended yet.
local ns, lifetime, final = ARGV[1], ARGV[2], ARGV[4] == '1'
local live, boxes = 0, {}
for _, id in ipairs(cmsgpack.unpack(ARGV[3])) do
  local req = ns .. 'req:' .. id
  local s = redis.call('HMGET', req, 'done', 'replica')
  if final then redis.call('HSET', req, 'final', 1) end
  if not s[1] then
    live = live + 1
    redis.call('HSET', req, 'cancelled', 1)
    redis.call('PEXPIRE', req, lifetime)
    if s[2] then
      local ids = boxes[s[2]]
      if ids then ids[#ids + 1] = id else boxes[s[2]] = {id} end
    end
  end
end
for replica, ids in pairs(boxes) do
  if redis.call('EXISTS', ns .. 'replica:' .. replica) == 1 then
    redis.call('XADD', ns .. 'inbox:' .. replica, '*', 'w', cmsgpack.pack({0, {'abort', ids}}))
  end
end
return live

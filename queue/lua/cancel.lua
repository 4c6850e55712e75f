-- Cancel requests wherever they are: on the broker (the dispatcher will find the mark) or in a replica (its inbox).
-- ARGV: namespace, lifetime (ms), msgpack array of ids, final (optional, 1: the request can never be revived).
-- Returns how many had not ended yet. What has ended with an answer or an error stays as it is; what was stopped because
-- nobody read it can be made final.
local ns, lifetime, final = ARGV[1], ARGV[2], ARGV[4] == '1'
local live, boxes = 0, {}

local function aborted(id)
  local last = redis.call('LINDEX', ns .. 'tok:' .. id, -1)
  if not last then return false end
  local _, _, _, finish = cmsgpack.unpack_limit(last, 3, 1) -- no further: binary data, which it cannot read, may follow
  return finish == 2
end

for _, id in ipairs(cmsgpack.unpack(ARGV[3])) do
  local req = ns .. 'req:' .. id
  local s = redis.call('HMGET', req, 'done', 'replica')
  if final and (not s[1] or aborted(id)) then redis.call('HSET', req, 'final', 1) end
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

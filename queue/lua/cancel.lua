-- Cancel requests wherever they are: in a replica (its inbox), or not there (the dispatcher will find the mark).
-- ARGV: namespace, lifetime (ms), msgpack array of ids; and, to cancel for good, what can never be revived: the frame
--       that ends it, retention (ms)
-- Returns how many had not ended yet. What has ended with an answer or an error stays as it is; what was stopped because
-- nobody read it can be made final.
-- What is final ends here and now where no replica has it: it may be in the broker, and long stay there. The mark stays
-- for a lifetime, so that it does not run when it is pulled.
local ns, lifetime, frame, retention = ARGV[1], ARGV[2], ARGV[4], ARGV[5]
local final, live, boxes, everybody = frame ~= nil, 0, {}, nil

local function aborted(id)
  local last = redis.call('LINDEX', ns .. 'tok:' .. id, -1)
  if not last then return false end
  local _, _, _, finish = cmsgpack.unpack_limit(last, 3, 1) -- no further: binary data, which it cannot read, may follow
  return finish == 2
end

-- Who reads it. Who published it is told by its record alone, which is in the broker until the first dispatch: so all.
local function readers(reply_to, dispatched)
  if not dispatched then
    everybody = everybody or redis.call('PUBSUB', 'CHANNELS', string.gsub(ns, '[%[%]*?\\]', '\\%0') .. 'ingress:*')
    return everybody
  end
  local named = {}
  for channel in string.gmatch(reply_to or '', '%S+') do named[#named + 1] = ns .. channel end
  return named
end

local function finish(id, req, reply_to, dispatched)
  local tok = ns .. 'tok:' .. id
  redis.call('HSET', req, 'done', 1)
  redis.call('RPUSH', tok, frame)
  redis.call('PEXPIRE', tok, retention)
  redis.call('PEXPIRE', ns .. 'http:' .. string.match(id, '[^:]*'), retention)
  for _, channel in ipairs(readers(reply_to, dispatched)) do
    redis.call('PUBLISH', channel, '\145\146' .. cmsgpack.pack(id) .. frame)
  end
end

for _, id in ipairs(cmsgpack.unpack(ARGV[3])) do
  local req = ns .. 'req:' .. id
  local s = redis.call('HMGET', req, 'done', 'replica', 'lost', 'reply_to', 'attempt')
  if final and (not s[1] or aborted(id)) then redis.call('HSET', req, 'final', 1) end
  if not s[1] then
    live = live + 1
    redis.call('HSET', req, 'cancelled', 1)
    redis.call('PEXPIRE', req, lifetime)
    local there = s[2] and redis.call('EXISTS', ns .. 'replica:' .. s[2]) == 1
    if there then
      local ids = boxes[s[2]]
      if ids then ids[#ids + 1] = id else boxes[s[2]] = {id} end
    end
    if final and (not there or s[3]) then finish(id, req, s[4], s[5]) end
  end
end
for replica, ids in pairs(boxes) do
  redis.call('XADD', ns .. 'inbox:' .. replica, '*', 'w', cmsgpack.pack({0, {'abort', ids}}))
end
return live

-- Stop posting the frames of these requests to this channel, also where it is the one that published them and a later
-- dispatch would add it: it is noted as left until it attaches again.
-- ARGV: namespace, lifetime (ms), channel, msgpack array of ids
-- Returns the ids that nobody reads any more: no other channel is named that a process listens on.
local ns, lifetime, channel = ARGV[1], ARGV[2], ARGV[3]

local function listens(name)
  return redis.call('PUBSUB', 'NUMSUB', ns .. name)[2] > 0
end

local unread = {}
for _, id in ipairs(cmsgpack.unpack(ARGV[4])) do
  local req = ns .. 'req:' .. id
  local others, read = {}, false
  for name in string.gmatch(redis.call('HGET', req, 'reply_to') or '', '%S+') do
    if name ~= channel then
      others[#others + 1] = name
      read = read or listens(name)
    end
  end
  redis.call('HSET', req, 'reply_to', table.concat(others, ' '), 'left:' .. channel, 1)
  if redis.call('PTTL', req) < 0 then redis.call('PEXPIRE', req, lifetime) end
  if not read then unread[#unread + 1] = id end
end
return unread

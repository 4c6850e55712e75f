-- Read requests along: from now on their frames are also posted to this channel.
-- ARGV: namespace, lifetime (ms), channel, msgpack array of ids
-- Returns per entry what is known of it:
--   unknown   nobody has been given it: it is in the queue, or nowhere. Publishing it (again) is safe
--   queued    in the queue, as whoever published it again has noted
--   running   dispatched, not ended;  done  the log holds its end
-- A cancellation that has found nothing to stop yet is taken back: here is somebody who wants the answer.
local ns, lifetime, channel = ARGV[1], ARGV[2], ARGV[3]

local function attach(id)
  local req = ns .. 'req:' .. id
  local s = redis.call('HMGET', req, 'reply_to', 'done', 'attempt', 'unpublished', 'published', 'cancelled', 'final',
    'replica')
  if s[2] then return 'done' end
  redis.call('HDEL', req, 'left:' .. channel)
  local channels = s[1] or ''
  if not string.find(' ' .. channels .. ' ', ' ' .. channel .. ' ', 1, true) then
    channels = channels == '' and channel or (channels .. ' ' .. channel)
    redis.call('HSET', req, 'reply_to', channels)
    if not s[1] then redis.call('PEXPIRE', req, lifetime) end
  end
  local withdrawn = s[6] and not s[7] and not s[8]
  if withdrawn then redis.call('HDEL', req, 'cancelled') end
  if withdrawn or s[4] then return 'unknown' end
  if s[3] then return 'running' end
  return s[5] and 'queued' or 'unknown'
end

local result = {}
for k, id in ipairs(cmsgpack.unpack(ARGV[4])) do result[k] = attach(id) end
return result

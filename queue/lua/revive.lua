-- Take back the end of a request that was cancelled because nobody read it.
-- ARGV: namespace, lifetime (ms), channel, id, position of the ABORT frame in the log, what to put in its place (its
--       tokens without the end; or empty)
-- Returns: revived (publish it again) | live (somebody has revived it before; the channel reads along from now on) |
--          final (cancelled on request: never)
-- The attempt that was cancelled is fenced: it may not have noticed yet.
local ns, lifetime, channel, id, position, instead = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6]
local req, tok = ns .. 'req:' .. id, ns .. 'tok:' .. id
local s = redis.call('HMGET', req, 'done', 'final', 'reply_to')
if s[2] then return 'final' end
redis.call('HDEL', req, 'left:' .. channel)
if not s[1] or redis.call('LLEN', tok) ~= position + 1 then
  local channels = s[3] or ''
  if not string.find(' ' .. channels .. ' ', ' ' .. channel .. ' ', 1, true) then
    redis.call('HSET', req, 'reply_to', channels .. ' ' .. channel)
    if redis.call('PTTL', req) < 0 then redis.call('PEXPIRE', req, lifetime) end
  end
  return 'live'
end
if instead == '' then redis.call('RPOP', tok) else redis.call('LSET', tok, position, instead) end
redis.call('HDEL', req, 'done', 'cancelled', 'replica', 'lost', 'handed', 'runs')
redis.call('HINCRBY', req, 'attempt', 1)
redis.call('HSET', req, 'unpublished', 1, 'reply_to', channel)
redis.call('PEXPIRE', req, lifetime)
redis.call('PEXPIRE', tok, lifetime)
redis.call('PEXPIRE', ns .. 'http:' .. string.match(id, '[^:]*'), lifetime)
return 'revived'

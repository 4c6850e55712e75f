-- End requests from outside an engine (error, cancellation, deadline): `done` refuses every later append.
-- ARGV: namespace, retention (ms), msgpack array of [id, reply_to, frame]
-- Returns per entry 1 if this call ended it, 0 if it had ended before.
local ns, retention = ARGV[1], ARGV[2]
local result = {}
for k, e in ipairs(cmsgpack.unpack(ARGV[3])) do
  local id, reply_to, frame = e[1], e[2], e[3]
  local req, tok = ns .. 'req:' .. id, ns .. 'tok:' .. id
  local s = redis.call('HMGET', req, 'done', 'reply_to', 'replica')
  if s[1] then
    result[k] = 0
  else
    redis.call('HSET', req, 'done', 1)
    redis.call('RPUSH', tok, frame)
    redis.call('PEXPIRE', req, retention)
    redis.call('PEXPIRE', tok, retention)
    redis.call('PEXPIRE', ns .. 'http:' .. string.match(id, '[^:]*'), retention)
    for channel in string.gmatch(s[2] or reply_to, '%S+') do
      redis.call('PUBLISH', ns .. channel, '\145\146' .. cmsgpack.pack(id) .. frame)
    end
    if s[3] and redis.call('EXISTS', ns .. 'replica:' .. s[3]) == 1 then
      redis.call('XADD', ns .. 'inbox:' .. s[3], '*', 'w', cmsgpack.pack({0, {'abort', {id}}}))
    end
    if s[3] and redis.call('GET', ns .. 'guest:' .. s[3]) == id then redis.call('DEL', ns .. 'guest:' .. s[3]) end
    result[k] = 1
  end
end
return result

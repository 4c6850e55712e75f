-- Forget what became of requests, so that they can be run from the beginning. Attempt numbers go on: whatever still
-- runs under an old one is fenced.
-- ARGV: namespace, lifetime (ms), msgpack array of ids.
local ns, lifetime = ARGV[1], ARGV[2]
for _, id in ipairs(cmsgpack.unpack(ARGV[3])) do
  local req, tok = ns .. 'req:' .. id, ns .. 'tok:' .. id
  redis.call('DEL', tok)
  redis.call('HDEL', req, 'done', 'cancelled', 'final', 'replica', 'lost', 'handed', 'runs', 'deaths', 'probation', 'source')
  redis.call('HINCRBY', req, 'attempt', 1)
  redis.call('HSET', req, 'next', 0)
  redis.call('PEXPIRE', req, lifetime)
end

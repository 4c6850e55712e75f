-- Note that requests are in the queue. ARGV: namespace, lifetime (ms), msgpack array of ids.
for _, id in ipairs(cmsgpack.unpack(ARGV[3])) do
  redis.call('HSET', ARGV[1] .. 'req:' .. id, 'published', '1')
  redis.call('PEXPIRE', ARGV[1] .. 'req:' .. id, ARGV[2])
end

-- Store an HTTP request under its stream id, once per idempotency key.
-- ARGV: namespace, lifetime (ms), stream id, stored request, key ('' without one), digest of the request, and the name
--       by which the client may also ask for it
-- Returns {stream id, digest} under which the key is taken already, else {} (stored now).
-- `posts` counts the requests that came with the key and were not refused: see release.lua.
local ns, lifetime, stream, stored, key, digest = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
if key ~= '' then
  local taken = redis.call('HMGET', ns .. 'idem:' .. key, 'stream', 'digest')
  if taken[1] and redis.call('EXISTS', ns .. 'http:' .. taken[1]) == 1 then
    if taken[2] == digest then redis.call('HINCRBY', ns .. 'idem:' .. key, 'posts', 1) end
    return taken
  end
  redis.call('HSET', ns .. 'idem:' .. key, 'stream', stream, 'digest', digest, 'posts', 1)
  redis.call('PEXPIRE', ns .. 'idem:' .. key, lifetime)
end
redis.call('SET', ns .. 'http-id:' .. ARGV[7], stream, 'PX', lifetime)
redis.call('SET', ns .. 'http:' .. stream, stored, 'PX', lifetime)
return {}

-- Count a segment's lines as finished: all of them or none, each once, by the lease's owner only.
-- KEYS: batch, lease, bitmap of finished lines, list of segments.
-- ARGV: owner, segment (msgpack), namespace, number of lines, how long the lines' token logs may still be read (ms),
-- number of counters, counters and what to add to them, then the line indexes, then the ids of the lines' records.
-- Returns 'ok', 'lost' when the lease is another's, or 'taken' when a line was finished before.
if redis.call('GET', KEYS[2]) ~= ARGV[1] then
  return 'lost'
end
if redis.call('LINDEX', KEYS[4], -1) == ARGV[2] then
  return 'ok'  -- the caller never got the first answer
end
local first = 7 + 2 * tonumber(ARGV[6])
local records = first + tonumber(ARGV[4])
for i = first, records - 1 do
  if redis.call('GETBIT', KEYS[3], ARGV[i]) == 1 then
    return 'taken'
  end
end
for i = first, records - 1 do
  redis.call('SETBIT', KEYS[3], ARGV[i], 1)
end
for i = records, #ARGV do
  if redis.call('HEXISTS', ARGV[3] .. 'req:' .. ARGV[i], 'done') == 1 then -- else it was given up, and that must be kept
    redis.call('PEXPIRE', ARGV[3] .. 'req:' .. ARGV[i], ARGV[5])
    redis.call('PEXPIRE', ARGV[3] .. 'tok:' .. ARGV[i], ARGV[5])
  end
end
for i = 7, first - 1, 2 do
  redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1])
end
redis.call('RPUSH', KEYS[4], ARGV[2])
return 'ok'

-- The backlog, on loan or not: finished entries are deleted, so what the streams hold is what is unfinished.
-- KEYS: the stream of each class in order of rank, the token counters.  Returns [requests, tokens, oldest age ms]...
local counters = KEYS[#KEYS]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local result = {}
for k = 1, #KEYS - 1 do
  local age, oldest = 0, redis.call('XRANGE', KEYS[k], '-', '+', 'COUNT', 1)[1]
  if oldest then age = math.max(0, now - tonumber(string.match(oldest[1], '^%d+'))) end
  result[k] = {redis.call('XLEN', KEYS[k]), tonumber(redis.call('HGET', counters, k - 1) or 0), age}
end
return result

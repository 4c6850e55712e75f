-- Append records to the queue, and count their tokens.
-- KEYS: the stream of each class in order of rank, the token counters.  ARGV: [rank, tokens, record]...
local counters = KEYS[#KEYS]
for k = 1, #ARGV, 3 do
  local rank, tokens = ARGV[k], ARGV[k + 1]
  redis.call('XADD', KEYS[rank + 1], '*', 't', tokens, 'r', ARGV[k + 2])
  redis.call('HINCRBY', counters, rank, tokens)
end
return #ARGV / 3

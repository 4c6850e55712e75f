-- Entries the group says a consumer has, where that is more than the consumer knows of: a server that lost its last
-- second forgot that they were finished, or never answered.
-- KEYS: the stream of each class in order of rank.  ARGV: group, consumer, then how many the consumer has, by class.
-- Returns {[rank, id, deliveries]...}
local group, consumer = ARGV[1], ARGV[2]
local result = {}
for k, stream in ipairs(KEYS) do
  for _, owner in ipairs(redis.call('XPENDING', stream, group)[4] or {}) do
    local count = tonumber(owner[2])
    if owner[1] == consumer and count > tonumber(ARGV[2 + k]) then
      for _, pending in ipairs(redis.call('XPENDING', stream, group, '-', '+', count, consumer)) do
        result[#result + 1] = {k - 1, pending[1], pending[4]}
      end
    end
  end
end
return result

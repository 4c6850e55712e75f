-- Read what fits a budget, strictly by class, oldest first in a class; at most one entry over in tokens a class.
-- KEYS: the stream of each class in order of rank.
-- ARGV: group, consumer, prefix of the lease keys, 1 to adopt entries of dead consumers, then by class four numbers:
--       requests and tokens that all may come to when one of it is taken, requests and tokens held of it already.
-- Returns {[rank, id, fields, deliveries]..., }, with whether entries were adopted as first element.
local group, consumer, lease = ARGV[1], ARGV[2], ARGV[3]
local adopting = ARGV[4] == '1'
local requests, tokens = 0, 0 -- what the class being read may still have
local used_requests, used_tokens = 0, 0
local result = {0}

local function take(rank, entry, deliveries)
  local fields = entry[2]
  for f = 1, #fields, 2 do
    if fields[f] == 't' then
      tokens = tokens - (tonumber(fields[f + 1]) or 0)
      used_tokens = used_tokens + (tonumber(fields[f + 1]) or 0)
    end
  end
  requests, used_requests = requests - 1, used_requests + 1
  result[#result + 1] = {rank, entry[1], fields, deliveries}
end

local function adopt_from(rank, stream, owner)
  for _, pending in ipairs(redis.call('XPENDING', stream, group, '-', '+', requests, owner)) do
    if requests <= 0 or tokens <= 0 then return end
    local entry = redis.call('XCLAIM', stream, group, consumer, 0, pending[1])[1]
    if entry then
      take(rank, entry, pending[4] + 1)
      result[1] = 1
    end
  end
  if #redis.call('XPENDING', stream, group, '-', '+', 1, owner) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', stream, group, owner)
  end
end

for k, stream in ipairs(KEYS) do
  used_requests, used_tokens = used_requests + ARGV[3 + 4 * k], used_tokens + ARGV[4 + 4 * k]
  requests, tokens = ARGV[1 + 4 * k] - used_requests, ARGV[2 + 4 * k] - used_tokens
  if adopting then
    for _, owner in ipairs(redis.call('XPENDING', stream, group)[4] or {}) do
      local name = owner[1]
      if requests > 0 and name ~= consumer and redis.call('EXISTS', lease .. name) == 0 then
        adopt_from(k - 1, stream, name)
      end
    end
  end
  while requests > 0 and tokens > 0 do
    local reply = redis.call('XREADGROUP', 'GROUP', group, consumer, 'COUNT', 1, 'STREAMS', stream, '>')
    if not reply then break end
    take(k - 1, reply[1][2][1], 1)
  end
end
return result

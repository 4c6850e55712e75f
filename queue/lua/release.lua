-- Forget a stored HTTP request that was not accepted, and free its idempotency key; unless others count on them.
-- ARGV: namespace, stream id, key ('' without one), the name by which the client may also ask for it, ended (1: its log
--       ends with an error that is worth trying again; nobody gets anything else of it), record ids
-- Returns 1 if it was forgotten. It is not while another POST with this key has been led to it and has not given up as
-- well, or while a record of it was published, is read or was run: it would run again under the same key otherwise.
local ns, stream, key, ended = ARGV[1], ARGV[2], ARGV[3], ARGV[5] == '1'
local idem, index = ns .. 'idem:' .. key, ns .. 'http-id:' .. ARGV[4]

local function in_use(id)
  local s = redis.call('HMGET', ns .. 'req:' .. id, 'attempt', 'published', 'reply_to')
  return s[1] or s[2] or (s[3] and s[3] ~= '')
end

local function counted_on()
  if key ~= '' and redis.call('HINCRBY', idem, 'posts', -1) > 0 then return true end
  for i = 6, #ARGV do
    if in_use(ARGV[i]) then return true end
  end
  return false
end

if key ~= '' and redis.call('HGET', idem, 'stream') ~= stream then return 0 end -- somebody has forgotten it already
if not ended and counted_on() then return 0 end
if key ~= '' then redis.call('DEL', idem) end
if redis.call('GET', index) == stream then redis.call('DEL', index) end
redis.call('DEL', ns .. 'http:' .. stream)
return 1

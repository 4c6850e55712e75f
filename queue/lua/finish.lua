-- End requests from outside an engine (error, cancellation, deadline): `done` refuses every later append.
-- ARGV: namespace, retention (ms), msgpack array of [id, reply_to, frame, attempt | nil, most deaths | nil]
-- With the last two it is given up: only if no newer attempt was given out, and so many replicas ended or failed with it.
-- What its dispatcher knows may be old: another one may have taken it over, and seen it get on well since.
-- Returns per entry [how it stands, deaths]:
--   ended     by this call;  given_up  by this call or before;  done  it had ended otherwise
--   false     it was kept
local ns, retention = ARGV[1], ARGV[2]

-- Counted as the next dispatch would.
local function count(deaths, replica, lost)
  if not replica or lost or redis.call('EXISTS', ns .. 'replica:' .. replica, ns .. 'left:' .. replica) > 0 then
    return deaths
  end
  return deaths + 1
end

-- Who reads it; and who published it, whom others do not know before the first dispatch.
local function readers(list, reply_to, dispatched)
  if not list then return reply_to end
  return dispatched and list or list .. ' ' .. reply_to
end

local function finish(id, reply_to, frame, known, most)
  local req, tok = ns .. 'req:' .. id, ns .. 'tok:' .. id
  local s = redis.call('HMGET', req, 'done', 'reply_to', 'replica', 'attempt', 'deaths', 'lost')
  local replica, attempt, deaths = s[3], tonumber(s[4] or 0), count(tonumber(s[5] or 0), s[3], s[6])
  if s[1] then return {s[1] == 'given_up' and s[1] or 'done', deaths} end
  if most and (attempt > known or deaths < most) then return {false, deaths} end
  local how = most and 'given_up' or 'ended'
  redis.call('HSET', req, 'done', how)
  redis.call('RPUSH', tok, frame)
  redis.call('PEXPIRE', req, retention)
  redis.call('PEXPIRE', tok, retention)
  redis.call('PEXPIRE', ns .. 'http:' .. string.match(id, '[^:]*'), retention)
  for channel in string.gmatch(readers(s[2], reply_to, attempt > 0), '%S+') do
    redis.call('PUBLISH', ns .. channel, '\145\146' .. cmsgpack.pack(id) .. frame)
  end
  if replica and redis.call('EXISTS', ns .. 'replica:' .. replica) == 1 then
    redis.call('XADD', ns .. 'inbox:' .. replica, '*', 'w', cmsgpack.pack({0, {'abort', {id}}}))
  end
  if replica and redis.call('GET', ns .. 'guest:' .. replica) == id then redis.call('DEL', ns .. 'guest:' .. replica) end
  return {how, deaths}
end

local result = {}
for k, e in ipairs(cmsgpack.unpack(ARGV[3])) do
  result[k] = finish(e[1], e[2], e[3], e[4], e[5])
end
return result

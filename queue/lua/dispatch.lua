-- Give requests to replicas, each with the next attempt.
-- ARGV: namespace, lifetime (ms), dispatcher channel, msgpack array of
--       [id, next, reply_to, replica, work, tenant, force, known attempt, known deaths, probation,
--       alone]
-- Returns per entry [status, attempt, next, replica, runs, deaths]. `runs` counts the replicas it was given to so far,
-- `deaths` those that ended while they had it, since it last got beyond the position `probation`.
--   ok         the work is in the replica's inbox under this attempt
--   adopted    another dispatcher gave it to a replica that is alive: we only watch it from now on (unless `force`)
--   emitted    the log holds `next` tokens, or knows of other deaths, than the dispatcher said: read, then dispatch
--              again (older attempts are fenced already)
--   done       the log holds the end;  given_up  and it is for the dead letters;  cancelled  nobody wants it
--   no_replica the replica is gone, or another request has it for itself: one near its last death is dispatched `alone`,
--              and no dispatcher puts others beside it until it has got on well or ended
-- A Redis that lost its last second forgot attempts it gave out: the next one is above the dispatcher's too.
local ns, lifetime, dispatcher = ARGV[1], ARGV[2], ARGV[3]
local alone_ms = 60000 -- what kills an engine does so at its first steps; the longest prefill takes less
local time = redis.call('TIME')
local fence = time[1] % 1000000 * 1000 + math.floor(time[2] / 1000) + 1

local function alive(replica)
  return replica and redis.call('EXISTS', ns .. 'replica:' .. replica) == 1
end

-- The readers there are, and the ingress that published, unless it has left (detach.lua).
local function readers(list, reply_to, left)
  if left then return list or '' end
  for channel in string.gmatch(list or '', '%S+') do
    if channel == reply_to then return list end
  end
  return list and list .. ' ' .. reply_to or reply_to
end

-- It was cancelled before it was ever dispatched, perhaps even before its ingress listened for it.
local function repeat_end(id, reply_to)
  local last = redis.call('LINDEX', ns .. 'tok:' .. id, -1)
  if last then redis.call('PUBLISH', ns .. reply_to, '\145\146' .. cmsgpack.pack(id) .. last) end
end

local function taken(replica, id)
  local guest = redis.call('GET', ns .. 'guest:' .. replica)
  return guest and guest ~= id
end

local function dispatch(id, expected, reply_to, replica, work, tenant, force, known, suspected, probation, alone)
  local req = ns .. 'req:' .. id
  local s = redis.call('HMGET', req, 'done', 'cancelled', 'next', 'reply_to', 'replica', 'attempt', 'lost', 'runs',
    'deaths', 'left:' .. reply_to)
  local next, runs, deaths = tonumber(s[3] or 0), tonumber(s[8] or 0), tonumber(s[9] or 0)
  local stored = tonumber(s[6] or 0)
  if s[1] then
    if not s[6] then repeat_end(id, reply_to) end
    return {s[1] == 'given_up' and s[1] or 'done', 0, next, '', runs, deaths}
  end
  if s[2] then return {'cancelled', 0, next, '', runs, deaths} end
  local runs_there = not s[7] and alive(s[5])
  if runs_there and not force and stored >= known then
    redis.call('HSET', req, 'dispatcher', dispatcher, 'reply_to', readers(s[4], reply_to, s[10]))
    return {'adopted', stored, next, s[5], runs, deaths}
  end
  if not alive(replica) or taken(replica, id) then return {'no_replica', 0, next, '', runs, deaths} end
  if s[5] and not s[7] and not runs_there and redis.call('EXISTS', ns .. 'left:' .. s[5]) == 0 then
    deaths = deaths + 1
  end
  if runs_there then -- it may be stuck there, and would never learn that it is fenced
    redis.call('XADD', ns .. 'inbox:' .. s[5], '*', 'w', cmsgpack.pack({0, {'abort', {id}}}))
  end
  local attempt = math.max(stored, known) + 1
  redis.call('HDEL', req, 'lost', 'replica', 'probation', 'unpublished', 'source')
  redis.call('HSET', req, 'attempt', attempt, 'fence', fence, 'next', next, 'reply_to', readers(s[4], reply_to, s[10]),
    'dispatcher', dispatcher, 'tenant', tenant, 'deaths', deaths)
  redis.call('PEXPIRE', req, lifetime)
  if next ~= expected or deaths ~= suspected then return {'emitted', attempt, next, '', runs, deaths} end
  redis.call('HSET', req, 'replica', replica, 'runs', runs + 1)
  if deaths > 0 then redis.call('HSET', req, 'probation', probation) end
  if alone then redis.call('SET', ns .. 'guest:' .. replica, id, 'PX', alone_ms) end
  redis.call('XADD', ns .. 'inbox:' .. replica, '*', 'w',
    '\147' .. cmsgpack.pack(attempt) .. work .. cmsgpack.pack(fence))
  return {'ok', attempt, next, replica, runs + 1, deaths}
end

local result = {}
for k, e in ipairs(cmsgpack.unpack(ARGV[4])) do
  result[k] = dispatch(e[1], e[2], e[3], e[4], e[5], e[6], e[7], e[8] or 0, e[9] or 0, e[10] or 0, e[11])
end
return result

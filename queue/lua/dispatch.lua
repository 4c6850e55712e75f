-- Give requests to replicas, each with the next attempt.
-- ARGV: namespace, lifetime (ms), dispatcher channel,
--       msgpack array of [id, next, reply_to, replica, work, tenant, force]
-- Returns per entry [status, attempt, next, replica, runs], `runs` counting the replicas it was given to so far:
--   ok         the work is in the replica's inbox under this attempt
--   adopted    another dispatcher gave it to a replica that is alive: we only watch it from now on (unless `force`)
--   emitted    the log holds `next` tokens, not the expected number: read them, then dispatch again (older attempts
--              are fenced already)
--   done       the log holds the end;  cancelled  nobody wants it;  no_replica  the replica is gone
local ns, lifetime, dispatcher = ARGV[1], ARGV[2], ARGV[3]

local function alive(replica)
  return replica and redis.call('EXISTS', ns .. 'replica:' .. replica) == 1
end

local function dispatch(id, expected, reply_to, replica, work, tenant, force)
  local req = ns .. 'req:' .. id
  local s = redis.call('HMGET', req, 'done', 'cancelled', 'next', 'reply_to', 'replica', 'attempt', 'lost', 'runs')
  local next, runs = tonumber(s[3] or 0), tonumber(s[8] or 0)
  if s[1] then return {'done', 0, next, '', runs} end
  if s[2] then return {'cancelled', 0, next, '', runs} end
  if not force and not s[7] and alive(s[5]) then
    redis.call('HSET', req, 'dispatcher', dispatcher)
    return {'adopted', tonumber(s[6]), next, s[5], runs}
  end
  if not alive(replica) then return {'no_replica', 0, next, '', runs} end
  local attempt = redis.call('HINCRBY', req, 'attempt', 1)
  redis.call('HDEL', req, 'lost', 'replica')
  redis.call('HSET', req, 'next', next, 'reply_to', s[4] or reply_to, 'dispatcher', dispatcher, 'tenant', tenant)
  redis.call('PEXPIRE', req, lifetime)
  if next ~= expected then return {'emitted', attempt, next, '', runs} end
  redis.call('HSET', req, 'replica', replica, 'runs', runs + 1)
  redis.call('XADD', ns .. 'inbox:' .. replica, '*', 'w', '\146' .. cmsgpack.pack(attempt) .. work)
  return {'ok', attempt, next, replica, runs + 1}
end

local result = {}
for k, e in ipairs(cmsgpack.unpack(ARGV[4])) do
  result[k] = dispatch(e[1], e[2], e[3], e[4], e[5], e[6], e[7])
end
return result

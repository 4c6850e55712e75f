-- Append one engine step for the whole batch to the token log.
-- ARGV: namespace, retention (ms), lifetime (ms), msgpack array of
--       [id, attempt, index, count, frame, final, hand_over replica | nil, hand_over work | nil, fence, back | nil],
--       the replica that appends
--       (an empty frame hands over, or gives back, without having produced a token)
-- Returns one status an entry: ok | stale | gap | done (the end is there already) | lost (appended, but the hand-over
-- found nobody, or it was given back to the dispatcher).
-- A log that lost its last second is behind its writers. An attempt newer than the stored one was given out in that
-- second: it takes over again, at the position where the log ends. `fence`, the time of the dispatch, tells apart two
-- attempts that such a log gave the same number.
-- Readers are woken by ONE message per ingress and ONE per dispatcher, however long the batch is.
local ns, retention, lifetime = ARGV[1], ARGV[2], ARGV[3]
local batch, writer = cmsgpack.unpack(ARGV[4]), ARGV[5]
local status, frames, events = {}, {}, {}

local function post(box, key, value)
  if not key then return end
  local list = box[key]
  if list then list[#list + 1] = value else box[key] = {value} end
end

local function tell(dispatcher, id, kind, attempt, replica)
  post(events, dispatcher, cmsgpack.pack({id, kind, attempt, replica}))
end

local function publish(box)
  for channel, list in pairs(box) do
    redis.call('PUBLISH', ns .. channel, '\221' .. struct.pack('>I4', #list) .. table.concat(list))
  end
end

local function release(id)
  local guest = ns .. 'guest:' .. (writer or '')
  if redis.call('GET', guest) == id then redis.call('DEL', guest) end
end

local function hand_over(req, id, attempt, fence, replica, work, final, cancelled, dispatcher)
  if redis.call('EXISTS', ns .. 'replica:' .. replica) == 1 then
    local inbox = ns .. 'inbox:' .. replica
    redis.call('HSET', req, 'replica', replica, 'handed', attempt, 'source', writer)
    redis.call('XADD', inbox, '*', 'w', '\147' .. cmsgpack.pack(attempt) .. work .. cmsgpack.pack(fence))
    if not final then tell(dispatcher, id, 'prefilled', attempt, replica) end
    if cancelled and not final then -- the cancellation found nothing in the prefill replica any more: pass it on
      redis.call('XADD', inbox, '*', 'w', cmsgpack.pack({0, {'abort', {id}}}))
    end
    return 'ok'
  elseif final then
    return 'ok'
  end
  redis.call('HSET', req, 'lost', 1)
  tell(dispatcher, id, 'lost', attempt, '')
  return 'lost'
end

for k, e in ipairs(batch) do
  local id, attempt, index, count, frame, final, replica, work = e[1], e[2], e[3], e[4], e[5], e[6], e[7], e[8]
  local fence, back = e[9] or 0, e[10]
  local req, tok = ns .. 'req:' .. id, ns .. 'tok:' .. id
  local s = redis.call('HMGET', req, 'attempt', 'next', 'reply_to', 'dispatcher', 'done', 'handed', 'cancelled', 'fence',
    'probation', 'lost', 'source')
  local stored, next = tonumber(s[1] or 0), tonumber(s[2] or 0)
  local same = attempt == stored and (fence == 0 or fence == tonumber(s[8] or 0))
  if s[5] then
    status[k] = 'done'
  elseif attempt <= stored and not same then
    status[k] = 'stale'
  elseif same and ((index >= 0 and index < next) or (frame == '' and not back and tonumber(s[6] or 0) == attempt)) then
    status[k] = 'ok' -- one writer an attempt: this is its own append again, sent twice because the answer was lost
  elseif back and s[10] then
    status[k] = 'lost'
  elseif index > next then
    status[k] = 'gap'
    if same then -- nobody has what is missing: generate it again
      redis.call('HSET', req, 'lost', 1)
      tell(s[4], id, 'lost', attempt, '')
    end
  else
    status[k] = 'ok'
    if not same then
      redis.call('HSET', req, 'attempt', attempt, 'fence', fence, 'replica', writer)
      redis.call('PEXPIRE', req, lifetime)
    end
    if frame ~= '' then
      redis.call('RPUSH', tok, frame)
      for reader in string.gmatch(s[3] or '', '%S+') do
        post(frames, reader, '\146' .. cmsgpack.pack(id) .. frame)
      end
    end
    if s[11] and not back then -- it goes on in the replica it was handed to, which has read the other one's KV cache
      redis.call('HDEL', req, 'source')
      if not final then tell(s[4], id, 'loaded', attempt, '') end
    end
    next = next + count
    if final then
      redis.call('HSET', req, 'next', next, 'done', 1)
      redis.call('PEXPIRE', req, retention)
      redis.call('PEXPIRE', tok, retention)
      redis.call('PEXPIRE', ns .. 'http:' .. string.match(id, '[^:]*'), retention)
      tell(s[4], id, 'done', attempt, '')
      if s[9] then release(id) end
    else
      redis.call('HSET', req, 'next', next)
      if index == 0 then redis.call('PEXPIRE', tok, lifetime) end
      if s[9] and next >= tonumber(s[9]) then -- it survived what it was suspected of
        redis.call('HDEL', req, 'probation', 'deaths')
        release(id)
        tell(s[4], id, 'cleared', attempt, '')
      end
    end
    if back then
      status[k] = 'lost'
      redis.call('HSET', req, 'lost', 1)
      if back == 'failed' then redis.call('HINCRBY', req, 'deaths', 1) end
      release(id)
      tell(s[4], id, back, attempt, '')
    elseif replica then
      status[k] = hand_over(req, id, attempt, fence, replica, work, final, s[7], s[4])
    end
  end
end
publish(frames)
publish(events)
return status

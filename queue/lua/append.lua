-- Append one engine step for the whole batch to the token log.
-- ARGV: namespace, retention (ms), lifetime (ms), msgpack array of
--       [id, attempt, index, count, frame, final, hand_over replica | nil, hand_over work | nil]
--       (an empty frame hands over without having produced a token)
-- Returns one status an entry: ok | stale | gap | gone | done (the end is there already) | lost (appended, but the
-- hand-over found nobody).
-- Readers are woken by ONE message per ingress and ONE per dispatcher, however long the batch is.
local ns, retention, lifetime = ARGV[1], ARGV[2], ARGV[3]
local batch = cmsgpack.unpack(ARGV[4])
local status, frames, events = {}, {}, {}

local function post(box, key, value)
  local list = box[key]
  if list then list[#list + 1] = value else box[key] = {value} end
end

local function publish(box)
  for channel, list in pairs(box) do
    redis.call('PUBLISH', ns .. channel, '\221' .. struct.pack('>I4', #list) .. table.concat(list))
  end
end

for k, e in ipairs(batch) do
  local id, attempt, index, count, frame, final, replica, work = e[1], e[2], e[3], e[4], e[5], e[6], e[7], e[8]
  local req, tok = ns .. 'req:' .. id, ns .. 'tok:' .. id
  local s = redis.call('HMGET', req, 'attempt', 'next', 'reply_to', 'dispatcher', 'done', 'handed', 'cancelled')
  if s[5] then
    status[k] = 'done'
  elseif not s[1] then
    status[k] = 'gone'
  elseif tonumber(s[1]) ~= attempt then
    status[k] = 'stale'
  elseif (index >= 0 and index < tonumber(s[2])) or (frame == '' and tonumber(s[6] or 0) == attempt) then
    status[k] = 'ok' -- one writer an attempt: this is its own append again, sent twice because the answer was lost
  elseif index > tonumber(s[2]) then
    status[k] = 'gap'
  else
    status[k] = 'ok'
    if frame ~= '' then
      redis.call('RPUSH', tok, frame)
      post(frames, s[3], '\146' .. cmsgpack.pack(id) .. frame)
    end
    if final then
      redis.call('HSET', req, 'next', s[2] + count, 'done', 1)
      redis.call('PEXPIRE', req, retention)
      redis.call('PEXPIRE', tok, retention)
      post(events, s[4], cmsgpack.pack({id, 'done', attempt, ''}))
    else
      redis.call('HSET', req, 'next', s[2] + count)
      if index == 0 then redis.call('PEXPIRE', tok, lifetime) end
    end
    if replica then
      if redis.call('EXISTS', ns .. 'replica:' .. replica) == 1 then
        local inbox = ns .. 'inbox:' .. replica
        redis.call('HSET', req, 'replica', replica, 'handed', attempt)
        redis.call('XADD', inbox, '*', 'w', '\146' .. cmsgpack.pack(attempt) .. work)
        if not final then post(events, s[4], cmsgpack.pack({id, 'prefilled', attempt, replica})) end
        if s[7] and not final then -- the cancellation found nothing in the prefill replica any more: pass it on
          redis.call('XADD', inbox, '*', 'w', cmsgpack.pack({0, {'abort', {id}}}))
        end
      elseif not final then
        status[k] = 'lost'
        redis.call('HSET', req, 'lost', 1)
        post(events, s[4], cmsgpack.pack({id, 'lost', attempt, ''}))
      end
    end
  end
end
publish(frames)
publish(events)
return status

-- Shared by the scripts that include it; not a script of its own.
-- KEYS[1] is the prefix of all keys of the store in each of them. Times are unix seconds by this server's clock.

local prefix = KEYS[1]

local function now()
  local t = redis.call('TIME')
  return tonumber(t[1]) + tonumber(t[2]) / 1000000
end

local function stamp(seconds)
  return string.format('%.6f', seconds)
end

local function of(batch, part)
  return prefix .. 'batch:' .. batch .. ':' .. part
end

local function record(batch)
  return prefix .. 'batch:' .. batch
end

-- Whether the job has ended: its byte in `states` is set.
local function ended(batch, index)
  local byte = redis.call('GETRANGE', of(batch, 'states'), index, index)
  return byte ~= '' and byte ~= '\0'
end

-- The batch has ready work: it joins its lane at the lane's present virtual time, unless it is there already. That is the time
-- that claims have brought it to (claim.lua), or of whoever is next, for the same upstream; another upstream's workers may be far
-- ahead or behind. The first job of a new one (`leads`) is also found apart from its turn.
local function wake(batch, leads)
  local lane = redis.call('HMGET', record(batch), 'lane', 'label')
  if not lane[1] then return end
  local name = lane[1] .. ':' .. lane[2]
  local head = redis.call('ZRANGE', prefix .. 'lane:' .. name, 0, 0, 'WITHSCORES')
  local turn = math.max(tonumber(head[2] or '0'), tonumber(redis.call('GET', prefix .. 'turn:' .. name) or '0'))
  redis.call('SADD', prefix .. 'lanes', name)
  redis.call('ZADD', prefix .. 'lane:' .. name, 'NX', stamp(turn), batch)
  if leads then redis.call('ZADD', prefix .. 'leads:' .. name, stamp(now()), batch) end
end

-- One job of a lease is settled, one way or the other; the lease goes with its last job.
local function release(token)
  local lease = prefix .. 'lease:' .. token
  if redis.call('EXISTS', lease) == 1 and redis.call('HINCRBY', lease, 'left', -1) <= 0 then
    redis.call('DEL', lease)
    redis.call('ZREM', prefix .. 'leases', token)
  end
end

-- What calls cost, as one text: attempts, prompt, completion, reasoning, cached and total tokens, joined by commas.
local SPENT = {'attempts', 'prompt_tokens', 'completion_tokens', 'reasoning_tokens', 'cached_tokens', 'total_tokens'}

-- Adds a text of costs to sums, a list of six. Of `token`, a lease that may have run out, only the tokens if the reaper has
-- counted its calls.
local function add_spent(sums, text, batch, index, token)
  local counted = token and redis.call('SISMEMBER', of(batch, 'strays'), 'lost:' .. token .. ':' .. index) == 1
  local k = 0
  for value in string.gmatch(text, '[^,]+') do
    k = k + 1
    if k > 1 or not counted then sums[k] = (sums[k] or 0) + tonumber(value) end
  end
end

local function count_spent(batch, sums)
  for k, name in ipairs(SPENT) do
    if sums[k] and sums[k] ~= 0 then redis.call('HINCRBY', record(batch), name, string.format('%.0f', sums[k])) end
  end
end

-- Whether this lease has not told before what it spent on a job that did not end by it: each tells once, however often
-- the telling is repeated.
local function tells_first(batch, index, token)
  if redis.call('EXISTS', record(batch)) == 0 then return false end
  local strays = of(batch, 'strays')
  if redis.call('SADD', strays, token .. ':' .. index) == 0 then return false end
  local left = redis.call('TTL', record(batch))
  if left > 0 then redis.call('EXPIRE', strays, left) end
  return true
end

-- Says to whoever follows the batch what has happened: the indexes of jobs that ended in this call (`just_ended`), joined by
-- commas; '' when something else about it changed.
local just_ended = {}
local followed = {}

local function tell(batch)
  redis.call('PUBLISH', of(batch, 'events'), table.concat(just_ended[batch] or {}, ','))
  just_ended[batch] = nil
end

-- Every way in which a job ends comes through here: of a batch that says so in `followup`, something follows each of its ends.
local function has_ended(batch, index)
  local list = just_ended[batch]
  if not list then
    list = {}
    just_ended[batch] = list
    followed[batch] = redis.call('HEXISTS', record(batch), 'followup') == 1
  end
  list[#list + 1] = index
  if followed[batch] then redis.call('ZADD', prefix .. 'followups', stamp(now()), batch .. '-' .. index) end
end

local ENDED_BY = {c = 'cancelled', x = 'expired'}

-- An event in the outbox: what has happened to `subject` is to be told to an address. `counter` is the hash that numbers the
-- batch's events.
local function post(counter, batch, tenant, subject, what, url)
  local id = 'evt_' .. batch .. '_' .. redis.call('HINCRBY', counter, 'events', 1)
  local at = stamp(now())
  redis.call('HSET', prefix .. 'event:' .. id, 'kind', 'webhook', 'type', what, 'tenant', tenant, 'subject', subject,
    'url', url, 'created_at', at, 'attempts', 0)
  redis.call('ZADD', prefix .. 'outbox', at, id)
  redis.call('ZADD', prefix .. 'tenant:' .. tenant .. ':events', at, id)
  redis.call('PUBLISH', prefix .. 'outbox', id)
end

-- The end of a batch, or of the job that is one, is to be told to its `callback`.
local function post_event(batch)
  local r = redis.call('HMGET', record(batch), 'callback', 'tenant', 'single', 'closing', 'cancelled', 'expired', 'succeeded')
  if not r[1] then return end
  local subject, what = batch, 'batch.' .. (ENDED_BY[r[4]] or 'completed')
  if r[3] then
    subject = batch .. '-0'
    what = 'job.' .. (r[5] ~= '0' and 'cancelled' or r[6] ~= '0' and 'expired' or r[7] ~= '0' and 'succeeded' or 'failed')
  end
  post(record(batch), batch, r[2] or '', subject, what, r[1])
end

-- Batches up to this many jobs have their results' expiry set in the step that ends them; larger ones by the reaper.
local RETIRED_AT_ONCE = 1000

-- The results of an ended batch go with it, and not before: their retention begins at its end.
local function retire(batch, total, ttl)
  if total > RETIRED_AT_ONCE or redis.call('EXISTS', prefix .. 'elsewhere') == 1 then
    redis.call('HSET', prefix .. 'retiring', batch, '0:' .. total .. ':' .. string.format('%.0f', math.ceil(now() + ttl)))
    return
  end
  for index = 0, total - 1 do
    redis.call('EXPIRE', 'celery-task-meta-' .. batch .. '-' .. string.format('%d', index), ttl)
  end
end

-- The batch is not over: found by who looks at what is under way. One of several jobs is also kept with their number, so that
-- nobody need look at each of many singles to know what is outstanding.
local function let_open(batch, total, created_at)
  redis.call('ZADD', prefix .. 'open', created_at, batch)
  if tonumber(total) > 1 then redis.call('ZADD', prefix .. 'open:many', total, batch) end
end

-- An OpenAI batch has to be validated or finalized at this time; nil: no longer. What is due is listed by tenant, and tenants by
-- when it is their turn: one that waits for its turn keeps it, however old what it has is.
local function set_due(batch, at)
  local tenant = redis.call('HGET', of(batch, 'openai'), 'tenant')
  if not tenant then return end
  local list, tenants = prefix .. 'tenant:' .. tenant .. ':due', prefix .. 'openai:due'
  if at then redis.call('ZADD', list, stamp(at), batch) else redis.call('ZREM', list, batch) end
  local first = redis.call('ZRANGE', list, 0, 0, 'WITHSCORES')
  if not first[2] then
    redis.call('ZREM', tenants, tenant)
    return
  end
  local turn = tonumber(redis.call('ZSCORE', tenants, tenant) or 'inf')
  if turn > now() or turn < tonumber(first[2]) then redis.call('ZADD', tenants, first[2], tenant) end
end

-- Every ended job is counted once, so the sum tells when the batch is over. Its keys live on for the retention time.
local function close_if_over(batch)
  local b = record(batch)
  local n = redis.call('HMGET', b, 'total', 'succeeded', 'failed', 'cancelled', 'expired', 'state', 'ttl', 'lane', 'label',
    'identity', 'protocol')
  if n[6] == 'finished' or not n[1] then return false end
  if tonumber(n[2]) + tonumber(n[3]) + tonumber(n[4]) + tonumber(n[5]) < tonumber(n[1]) then return false end
  redis.call('HSET', b, 'state', 'finished', 'finished_at', stamp(now()))
  for _, list in ipairs({'open', 'open:many', 'deadlines', 'due'}) do redis.call('ZREM', prefix .. list, batch) end
  redis.call('SREM', prefix .. 'closing', batch)
  for _, list in ipairs({'lane:', 'leads:'}) do redis.call('ZREM', prefix .. list .. n[8] .. ':' .. n[9], batch) end
  redis.call('ZREM', prefix .. 'quarantine:' .. n[8] .. ':' .. n[9], batch)
  redis.call('DEL', of(batch, 'ready'), of(batch, 'claims'), of(batch, 'retries'), of(batch, 'history'),
    of(batch, 'quarantine'), of(batch, 'suspects'))
  local ttl = tonumber(n[7])
  redis.call('EXPIRE', b, ttl)
  -- They grew by a job at a time, into room that doubled each time: what is left over of it goes.
  for _, part in ipairs(tonumber(n[1]) > RETIRED_AT_ONCE and {'states', 'done'} or {}) do
    redis.call('SET', of(batch, part), redis.call('GET', of(batch, part)) or '')
  end
  for _, part in ipairs({'requests', 'states', 'done', 'strays'}) do redis.call('EXPIRE', of(batch, part), ttl) end
  retire(batch, tonumber(n[1]), ttl)
  if n[11] == 'openai' then
    redis.call('EXPIRE', of(batch, 'openai'), ttl)
    set_due(batch, now())  -- its files come first, then its event
  else
    post_event(batch)
  end
  -- The identity may stand for a newer batch by now, whose hold on it must not end with this one.
  local identity = prefix .. 'identity:' .. n[10]
  if n[10] ~= '' and redis.call('GET', identity) == batch then redis.call('EXPIRE', identity, ttl) end
  return true
end

-- The deadline of a batch has passed: nothing more of it is claimed, and what is in flight is broken off.
local function expire_if_due(batch, at)
  local deadline = redis.call('ZSCORE', prefix .. 'deadlines', batch)
  if not deadline or tonumber(deadline) > at then return end
  redis.call('ZREM', prefix .. 'deadlines', batch)
  if redis.call('HGET', record(batch), 'closing') == '' then
    redis.call('HSET', record(batch), 'state', 'cancelling', 'closing', 'x', 'closing_at', stamp(at))
    redis.call('SADD', prefix .. 'closing', batch)
    tell(batch)
  end
end

-- What is told beside the result of a job that ended without an answer, of the calls it had: jobs.results.About.
local function about_calls(attempts)
  local sums = {}
  for _, attempt in ipairs(cjson.decode(attempts)) do
    for name, tokens in pairs(type(attempt.usage) == 'table' and attempt.usage or {}) do
      sums[name] = (sums[name] or 0) + tokens
    end
  end
  local usage = {}
  for name, tokens in pairs(sums) do usage[#usage + 1] = '"' .. name .. '":' .. string.format('%.0f', tokens) end
  return '{"custom_id":null,"endpoint":"","usage":{' .. table.concat(usage, ',') .. '},"attempts":' .. attempts .. '}'
end

-- A job ends without an answer because its batch was cancelled ('c') or expired ('x'): Celery sees it as REVOKED.
-- `attempts` is the JSON of the calls it had, '' for none.
local function revoke(batch, index, letter, attempts)
  local why = letter == 'x' and 'expired' or 'cancelled'
  local id = batch .. '-' .. index
  local mimoq = attempts ~= '' and ',"mimoq":' .. about_calls(attempts) or ''
  local meta = '{"status":"REVOKED","result":{"exc_type":"TaskRevokedError","exc_message":["' .. why ..
    '"],"exc_module":"celery.exceptions"},"traceback":null,"children":[],"date_done":null,"task_id":"' .. id .. '"' ..
    mimoq .. '}'
  redis.call('SETRANGE', of(batch, 'states'), index, letter)
  redis.call('APPEND', of(batch, 'done'), struct.pack('<I4', index))
  redis.call('HDEL', of(batch, 'history'), index)
  redis.call('ZREM', of(batch, 'retries'), index)
  redis.call('HINCRBY', record(batch), why, 1)
  -- Nobody but this step knows of these ends: counted as jobs.tally does.
  redis.call('HINCRBY', prefix .. 'metrics',
    '["jobs_ended_total","' .. why .. '","' .. (redis.call('HGET', record(batch), 'lane') or '') .. '","",""]', 1)
  has_ended(batch, index)
  local key = 'celery-task-meta-' .. id
  if redis.call('EXISTS', prefix .. 'elsewhere') == 1 then
    redis.call('RPUSH', prefix .. 'revoked', id .. ' ' .. meta)
  else
    redis.call('SET', key, meta)
    redis.call('PUBLISH', key, meta)
  end
end

-- A job goes back to its batch: at once, after `delay` seconds, or not at all where the batch is closing.
-- Returns true when the job is ready at once; the caller collects those into one ready slice.
local function give_back(batch, index, token, delay, attempts)
  redis.call('HDEL', of(batch, 'claims'), index)
  release(token)
  local closing = redis.call('HGET', record(batch), 'closing')
  if closing and closing ~= '' then
    if attempts == '' then attempts = redis.call('HGET', of(batch, 'history'), index) or '' end
    revoke(batch, index, closing, attempts)
    return false
  end
  if attempts ~= '' then redis.call('HSET', of(batch, 'history'), index, attempts) end
  if delay <= 0 then return true end
  local at = now() + delay
  redis.call('ZADD', of(batch, 'retries'), stamp(at), index)
  redis.call('ZADD', prefix .. 'due', 'LT', stamp(at), batch)
  return false
end

-- Has the jobs that a batch has in quarantine found.
local function offer_suspects(batch)
  local lane = redis.call('HMGET', record(batch), 'lane', 'label')
  if redis.call('EXISTS', of(batch, 'quarantine')) == 1 then
    redis.call('ZADD', prefix .. 'quarantine:' .. lane[1] .. ':' .. lane[2], 'NX', stamp(now()), batch)
  end
end

-- Somebody has deleted the batch's record: what is left of it goes too, and is nobody's any more.
local function is_gone(batch)
  if redis.call('EXISTS', record(batch)) == 1 then return false end
  for _, part in ipairs({'ready', 'claims', 'retries', 'history', 'quarantine', 'suspects', 'strays'}) do
    redis.call('DEL', of(batch, part))
  end
  for _, list in ipairs({'open', 'open:many', 'deadlines', 'due'}) do redis.call('ZREM', prefix .. list, batch) end
  redis.call('SREM', prefix .. 'closing', batch)
  return true
end

-- Up to `most` batches with a retry that is due have ready work; returns how many.
local function wake_due(at, most)
  local due = redis.call('ZRANGEBYSCORE', prefix .. 'due', '-inf', at, 'LIMIT', 0, most)
  for _, batch in ipairs(due) do
    if not is_gone(batch) then wake(batch) end
    local next = redis.call('ZRANGEBYSCORE', of(batch, 'retries'), '(' .. at, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
    if #next > 0 then
      redis.call('ZADD', prefix .. 'due', next[2], batch)
    else
      redis.call('ZREM', prefix .. 'due', batch)
    end
  end
  return #due
end

-- A job that may kill whoever calls it: it is called where nothing else runs. `suspects` remembers it, with the crashes it
-- was alone at.
local function quarantine(batch, index)
  redis.call('HSETNX', of(batch, 'suspects'), index, 0)
  redis.call('RPUSH', of(batch, 'quarantine'), index)
  offer_suspects(batch)
end

-- Jobs of one block are ready again: they go before what was never claimed. `crashes` of workers that held them; -1: they
-- have killed enough, and are to be ended, not called.
local function make_ready(batch, indexes, crashes)
  if #indexes == 0 then return end
  redis.call('RPUSH', of(batch, 'ready'), crashes .. ':' .. table.concat(indexes, ','))
  wake(batch)
end

#!lua
-- Reserves upstream calls on one (account, model), for a block of jobs in one round trip.
--
-- KEYS[1..5] see limits.lua    KEYS[6] models with a record (zset: '<account>:<model>' -> time of last use)
-- KEYS[7] what keys of leases begin with (hash: batch; c<index> = calls of that job that were let through under the lease)
-- KEYS[8] what keys of batches begin with (hash: state)    KEYS[9] there while a worker of the account serves the interactive lane
-- ARGV[1] requests a minute, '' for no limit     ARGV[2] tokens a minute, ''     ARGV[3] calls in flight, ''
-- ARGV[4] share of the rates that is interactive jobs'    ARGV[5] seconds a reservation lives unless renewed
-- ARGV[6] prefix of reservation ids, which begins with the lane's first letter: 'b' or 'i'    ARGV[7] who asks
-- ARGV[8] calls in flight that it has, without those that are settled in the same step    ARGV[9] this record's member of KEYS[6]
-- ARGV[10..] of each candidate: its token estimate, and if it is a job that is held, a space, its fencing token, a space, its
--   index: the lease remembers the call, so that one which its worker does not live to tell of is on record (reap.lua);
--   one whose lease is gone, or whose batch is stopped, is passed over
--
-- Returns {delays in ms of the granted candidates, in order (-1: its lease is gone, -2: its batch is stopped), ms after which to ask again, what bound ('' if nothing:
-- requests, tokens, concurrency, window, interactive, share, or a gate's reason), 'account' or 'model' where a gate is
-- shut, else '', 1 if the call is a probe of one, the time in ms}. Ids are prefix .. '.' .. position.
--
-- Rates: buckets that hold 1% of the limit spread the calls (that of requests refills at 98.5% of it); the log of the last
-- minute, in quarters of a second, sees to it that no sliding minute ever holds more than the limit, whatever is given back
-- when and however late within half a second a call starts. The token bucket may owe. A request larger than the token burst saves
-- up for itself while others wait; one larger than a minute's budget goes alone. Each candidate is granted whole or not at
-- all, at most 100 ms ahead.
--
-- Lanes: while interactive jobs wait for a rate and their share is not used up, bulk is refused; beyond their share they are
-- refused while bulk waits. Of the concurrency at least one call and 5% are never bulk's while a worker serves the interactive
-- lane: nobody else could use them.
--
-- Workers: who frees places asks for them in the same step, so one that joins, or has few, would never get any of a cap that is
-- full. So who is refused one leaves word how many it has; whoever would have more with the one it asks for leaves one free, but
-- interactive jobs none for bulk.

--!include adapt.lua
--!include limits.lua

local AHEAD = 0.1
local CANDIDATES = 10
local WAITS_S = 0.25
-- Who has waited so long for its first place gets it even from one that has no other.
local STARVED_S = 2

local now, rec, before, account, account_before = begin(tonumber(ARGV[5]))
local interactive = string.sub(ARGV[6], 1, 1) == 'i'
local candidates = #ARGV - CANDIDATES + 1
local delays, ask, bound, shut_by, probe = {}, 0, '', '', 0

local function done()
  rec.at = now
  save(KEYS[1], '', rec, before)
  save(KEYS[5], 'gate_', account, account_before)
  for i = 1, 4 do redis.call('EXPIRE', KEYS[i], 86400) end
  redis.call('ZADD', KEYS[6], now, ARGV[9])
  return {delays, math.max(0, math.ceil(ask * 1000)), bound, shut_by, probe, string.format('%.0f', now * 1000)}
end

rec.window = rec.window or FIRST_WINDOW
if rec.gate_reason == 'retry_after' and now >= rec.gate_until then
  open(rec, now, redis.call('ZCARD', KEYS[2]) + redis.call('ZCARD', KEYS[3]))
end
for _, gated in ipairs({{account, 'account'}, {rec, 'model'}}) do
  if gated[1].gate_reason then
    bound, shut_by = gated[1].gate_reason, gated[2]
    if now < gated[1].gate_until then
      ask = gated[1].gate_until - now
      return done()
    end
    candidates, probe = math.min(candidates, 1), 1
  end
end
if rec.hold_until and now < rec.hold_until then
  ask, bound = rec.hold_until - now, 'requests'
  return done()
end
climb(rec, now)

-- A limit a minute that is the least of those given, told and learned; nil for none.
local function least(given, told, learned)
  local limit = math.min(tonumber(given) or math.huge, told or math.huge, learned or math.huge)
  return limit < math.huge and math.max(1, limit) or nil
end

-- Level, refill a second and burst of a bucket, refilled to now.
local function bucket(limit, level, rate, room)
  if not limit then return math.huge, math.huge, math.huge end
  local burst = math.max(1, limit * 0.01)
  rate = rate * limit / 60
  -- A debt is worked off within a minute, whatever usage an upstream reports.
  level = level and math.max(level, -limit) + rate * math.max(0, now - (rec.filled or now)) or burst
  return math.min(math.max(burst, room), level), rate, burst
end

local rpm, tpm = least(ARGV[1], rec.told_rpm, rec.rate and rec.rate * 60), least(ARGV[2], rec.told_tpm)
if rec.big and now > rec.big_until then rec.big, rec.big_by, rec.big_since, rec.big_until = nil, nil, nil, nil end
local requests, request_rate = bucket(rpm, rec.requests, 0.985, 0)
local tokens, token_rate, token_burst = bucket(tpm, rec.tokens, 1, rec.big or 0)

local SHARE = tonumber(ARGV[4])
local share = math.min(SHARE, (rec.share or SHARE) + SHARE / 60 * math.max(0, now - (rec.filled or now)))
local function cost(need)
  return math.max(rpm and 1 / rpm or 0, tpm and need / tpm or 0)
end

-- Was nobody here for so long that the living could not renew either? Then what looks lost gets its time once more.
local LOST_S = tonumber(ARGV[5])
local again = rec.at and now - rec.at > LOST_S and now + LOST_S
for _, key in ipairs({KEYS[2], KEYS[3]}) do
  redis.call('ZREMRANGEBYSCORE', key, '-inf', again and math.min(rec.again or 0, now) or now)
  if again then
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', key, '-inf', now)) do redis.call('ZADD', key, again, id) end
  end
end
rec.again = again or rec.again
local bulk_flying, interactive_flying = redis.call('ZCARD', KEYS[2]), redis.call('ZCARD', KEYS[3])
local flying = bulk_flying + interactive_flying
local cap, capped = math.floor(rec.window), 'window'
if (tonumber(ARGV[3]) or cap) < cap then cap, capped = tonumber(ARGV[3]), 'concurrency' end
if probe == 1 then cap, capped = tonumber(ARGV[3]) or 1e9, 'concurrency' end
local kept = math.max(1, math.floor(0.05 * cap))
local bulk_cap = redis.call('EXISTS', KEYS[9]) == 1 and math.max(1, cap - kept) or cap

local held = tonumber(ARGV[8])

-- Places that are left free for another worker.
local function left_free()
  if (rec.want_c or 0) <= now or rec.want_c_by == ARGV[7] then return 0 end
  if interactive and string.sub(rec.want_c_by, -4) == 'bulk' then return 0 end
  local starved = rec.want_c_n == 0 and now - rec.want_c_since >= STARVED_S
  return (held > rec.want_c_n or starved) and 1 or 0
end

-- This one waits for a place; of several the one that has the fewest is served first.
local function wait_for_place(until_)
  local mine, standing = rec.want_c_by == ARGV[7], (rec.want_c or 0) > now
  if standing and not mine and held >= rec.want_c_n then return end
  if not (standing and mine and rec.want_c_n == held) then rec.want_c_since = now end
  rec.want_c, rec.want_c_by, rec.want_c_n = until_, ARGV[7], held
end

-- Seconds until something leaves the log, and never so few that a call is granted ahead of it.
local function next_leaves()
  return math.max((rec.first + 1) * BIN + KEPT - now, AHEAD + 0.01)
end

-- Whether an interactive candidate goes before bulk; one that costs more than the share does when all of it is there.
local function goes_first(need)
  return interactive and SHARE > 0 and share >= math.min(cost(need), SHARE)
end

-- What keeps a candidate of so many tokens from going, how long it has to wait for it, and whether that is a rate.
local function hindrance(need)
  local free = left_free()
  if flying >= cap - free or (not interactive and bulk_flying >= bulk_cap - free) then return capped, AHEAD + 0.1 end
  local first = goes_first(need)
  if not interactive and (rec.want_i or 0) > now then return 'interactive', AHEAD + 0.05 end
  if interactive and not first and SHARE > 0 and (rec.want_b or 0) > now then return 'share', AHEAD + 0.1 end
  local what, wait = '', 0
  if rpm then
    if requests < 1 then what, wait = 'requests', (1 - requests) / request_rate end
    if (rec.sum_r or 0) + 1 > rpm and rec.first then
      what, wait = 'requests', math.max(wait, next_leaves())
    end
  end
  if tpm then
    local enough = math.min(need, tpm)
    -- The one that saves up goes before others; interactive ones only wait for it when it has waited for a minute.
    local saved_up = rec.big and rec.big_by ~= ARGV[7]
    if saved_up and not (first and now - rec.big_since < 60) then return 'tokens', AHEAD + 0.25 end
    saved_up = saved_up and not (first and string.sub(rec.big_by, -4) == 'bulk')
    if tokens < enough and (enough - tokens) / token_rate > wait then
      what, wait = 'tokens', (enough - tokens) / token_rate
    end
    if (rec.sum_t or 0) > 0 and rec.sum_t + enough > tpm and rec.first then
      what, wait = 'tokens', math.max(wait, next_leaves())
    end
    if wait > AHEAD and enough > token_burst and not saved_up then
      rec.big, rec.big_by, rec.big_since = enough, ARGV[7], rec.big_since or now
      rec.big_until = now + math.min(wait, 1) + 1
    end
  end
  return what, wait, what ~= ''
end

-- 0 where a job held by this lease may be called, else what its delay says instead.
local may = {}
local function may_call(token)
  if not may[token] then
    local batch = redis.call('HGET', KEYS[7] .. token, 'batch')
    may[token] = not batch and -1 or redis.call('HGET', KEYS[8] .. batch, 'state') == 'running' and 0 or -2
  end
  return may[token]
end

local ids, lost_at = {}, string.format('%.6f', now + LOST_S)
for i = 1, candidates do
  local need, token, index = string.match(ARGV[CANDIDATES - 1 + i], '^(%S+) ?(%S*) ?(%d*)$')
  need = tonumber(need)
  if token ~= '' and may_call(token) < 0 then
    delays[i] = may_call(token)
  else
    local what, wait, rated = hindrance(need)
    if wait > AHEAD then
      ask, bound = wait - AHEAD, what
      local until_ = now + math.min(ask, 1) + WAITS_S
      if what == capped then wait_for_place(until_) end
      if interactive then
        if (rated and goes_first(need)) or (what == capped and interactive_flying < kept) then
          rec.want_i, rec.want_by = until_, ARGV[7]
        end
      elseif rated or what == 'interactive' then
        rec.want_b = until_
      end
      break
    end
    requests, tokens, share = requests - 1, tokens - need, share - (interactive and cost(need) or 0)
    flying, held = flying + 1, held + 1
    if interactive then interactive_flying = interactive_flying + 1 else bulk_flying = bulk_flying + 1 end
    note(rec, now + wait, 1, need)
    if token ~= '' then redis.call('HINCRBY', KEYS[7] .. token, 'c' .. index, 1) end
    if rec.big_by == ARGV[7] then rec.big, rec.big_by, rec.big_since, rec.big_until = nil, nil, nil, nil end
    delays[i] = math.ceil(wait * 1000)
    ids[#ids + 1] = lost_at
    ids[#ids + 1] = ARGV[6] .. '.' .. i
  end
end
if #ids > 0 then redis.call('ZADD', interactive and KEYS[3] or KEYS[2], unpack(ids)) end
if interactive and bound == '' and rec.want_by == ARGV[7] then rec.want_i, rec.want_by = nil, nil end
if bound ~= capped and rec.want_c_by == ARGV[7] then
  rec.want_c, rec.want_c_by, rec.want_c_n, rec.want_c_since = nil, nil, nil, nil
end

if #ids > 0 and probe == 1 then
  if account.gate_reason then probed(account, now) end
  if rec.gate_reason then probed(rec, now) end
end
rec.filled = now
rec.requests, rec.tokens, rec.share = rpm and requests or nil, tpm and tokens or nil, share
return done()

-- Reserves upstream calls on one (account, model), for a block of jobs in one round trip.
--
-- KEYS[1] limit record (hash): r, t = levels of the request and token buckets, at = time of the last refill,
--         window = calls in flight we dare, thresh = where its doubling ends, until = no call before, why = the reason
-- KEYS[2] reservations in flight (zset: id -> time at which it counts as lost with its worker)
-- KEYS[3] gate of the account (hash: reason, status, since, until, step_s); absent while it is open
-- ARGV[1] requests a minute, '' for no limit     ARGV[2] tokens a minute, ''     ARGV[3] calls in flight, ''
-- ARGV[4] first window    ARGV[5] seconds a reservation lives unless renewed    ARGV[6] prefix of reservation ids
-- ARGV[7..] token estimate of each candidate
--
-- Returns {delays in ms of the granted candidates, in order, ms after which to ask again, what bound: '' or one of
-- requests, tokens, concurrency, window, gate, retry_after; detail}. Reservation ids are prefix .. '.' .. position.
--
-- Clock: this server's. A bucket refills at (limit - burst - 1) a minute with burst = 1% of the limit, so that no sliding
-- minute holds more than the limit, whatever the phase; small limits keep at least 0.9 of what is exact. The token bucket
-- may owe. Each candidate is granted whole or not at all, at most 100 ms ahead.

local AHEAD = 0.1
local t = redis.call('TIME')
local now = tonumber(t[1]) + tonumber(t[2]) / 1000000

local gate = redis.call('HMGET', KEYS[3], 'until', 'step_s', 'reason')
local candidates = #ARGV - 6
if gate[1] then
  local until_ = tonumber(gate[1])
  if now < until_ then return {{}, math.ceil((until_ - now) * 1000), 'gate', gate[3]} end
  candidates = math.min(candidates, 1)
end

local record = redis.call('HMGET', KEYS[1], 'r', 't', 'at', 'window', 'until', 'why')
if record[5] and now < tonumber(record[5]) then
  return {{}, math.ceil((tonumber(record[5]) - now) * 1000), record[6], ''}
end

redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%.6f', now))
local flying = redis.call('ZCARD', KEYS[2])
local window = math.floor(tonumber(record[4] or ARGV[4]))
local cap, capped = window, 'window'
if ARGV[3] ~= '' and tonumber(ARGV[3]) < cap then cap, capped = tonumber(ARGV[3]), 'concurrency' end

-- Level and rate per second of a bucket, refilled to now.
local function bucket(limit, level)
  if limit == '' then return math.huge, math.huge end
  limit = tonumber(limit)
  local burst = math.max(1, limit * 0.01)
  local rate = math.max(limit - burst - 1, 0.9 * (limit + 1 - burst)) / 60
  if not level then return burst, rate end
  -- A debt is worked off within a minute, whatever usage an upstream reports.
  level = math.max(tonumber(level), -limit)
  return math.min(burst, level + rate * math.max(0, now - tonumber(record[3] or now))), rate
end

local requests, request_rate = bucket(ARGV[1], record[1])
local tokens, token_rate = bucket(ARGV[2], record[2])
local token_burst = ARGV[2] == '' and math.huge or math.max(1, tonumber(ARGV[2]) * 0.01)

local delays, ask, bound = {}, 0, ''
for i = 1, candidates do
  if flying >= cap then
    ask, bound = 100, capped
    break
  end
  local need = tonumber(ARGV[6 + i])
  local wait = 0
  if requests < 1 then wait, bound = (1 - requests) / request_rate, 'requests' end
  -- A request larger than the burst goes when the bucket is full, and leaves it in debt.
  local enough = math.min(need, token_burst)
  if tokens < enough and (enough - tokens) / token_rate > wait then
    wait, bound = (enough - tokens) / token_rate, 'tokens'
  end
  if wait > AHEAD then
    ask = math.max(1, math.ceil((wait - AHEAD) * 1000))
    break
  end
  bound = ''
  requests = requests - 1
  tokens = tokens - need
  flying = flying + 1
  delays[#delays + 1] = math.ceil(wait * 1000)
  redis.call('ZADD', KEYS[2], string.format('%.6f', now + tonumber(ARGV[5])), ARGV[6] .. '.' .. i)
end

if gate[1] and #delays > 0 then
  -- The probe: one call goes; the next only after a step, which doubles.
  redis.call('HSET', KEYS[3], 'until', string.format('%.6f', now + tonumber(gate[2])),
    'step_s', math.min(tonumber(gate[2]) * 2, 60))
end
local level = {'at', string.format('%.6f', now)}
if ARGV[1] ~= '' then level[#level + 1] = 'r'; level[#level + 1] = string.format('%.6f', requests) end
if ARGV[2] ~= '' then level[#level + 1] = 't'; level[#level + 1] = string.format('%.6f', tokens) end
if #level > 2 or not record[3] then redis.call('HSET', KEYS[1], unpack(level)) end
return {delays, ask, bound, gate[3] or ''}

#!lua flags=allow-oom
-- Settles reservations of one (account, model): frees them, corrects the token bucket, adapts window and gates.
-- Idempotent by reservation id, always accepted.
--
-- KEYS[1] limit record    KEYS[2] reservations in flight    KEYS[3] gate of the account    (see reserve.lua)
-- ARGV[1] first window
-- ARGV[2..] five values a reservation: id, what came of it, tokens to give back to the bucket (negative: to take), seconds
--   to wait where the upstream said so ('' if not), HTTP status or ''
--   what came of it: clean (an answer, good or bad), refused (429), key (401), forbidden (403), funds (402),
--   unused (never called), other
--
-- Returns the number of reservations that were still in flight.

local t = redis.call('TIME')
local now = tonumber(t[1]) + tonumber(t[2]) / 1000000
local REASONS = {key = 'key_refused', forbidden = 'forbidden', funds = 'payment_required'}
local settled = 0
local record = redis.call('HMGET', KEYS[1], 'window', 'thresh', 'cut_at', 't', 'r')
local window = tonumber(record[1] or ARGV[1])
local thresh = tonumber(record[2] or math.huge)
local cut_at = tonumber(record[3] or 0)
local tokens, requests = tonumber(record[4] or 0), tonumber(record[5] or 0)
local flying = redis.call('ZCARD', KEYS[2])
for i = 2, #ARGV, 5 do
  if redis.call('ZREM', KEYS[2], ARGV[i]) == 1 then
    settled = settled + 1
    local what = ARGV[i + 1]
    tokens = tokens + tonumber(ARGV[i + 2])
    if what == 'unused' then requests = requests + 1 end
    if what == 'clean' then
      redis.call('DEL', KEYS[3])
      -- One more for each clean answer doubles the window in a round; past the threshold, one more in ten rounds. It
      -- grows only while it is used.
      if window <= 2 * flying then
        if window < thresh then window = window + 1 else window = window + 0.1 / window end
      end
    elseif what == 'refused' then
      if ARGV[i + 3] ~= '' then
        local until_ = now + tonumber(ARGV[i + 3])
        local before = redis.call('HGET', KEYS[1], 'until')
        if not before or tonumber(before) < until_ then
          redis.call('HSET', KEYS[1], 'until', string.format('%.6f', until_), 'why', 'retry_after')
        end
      elseif now - cut_at > 1 then
        window = math.max(1, math.min(window, flying) * 0.7)
        thresh, cut_at = window, now
      end
    elseif REASONS[what] then
      if redis.call('EXISTS', KEYS[3]) == 0 then
        redis.call('HSET', KEYS[3], 'since', string.format('%.6f', now), 'step_s', 10,
          'until', string.format('%.6f', now + 5))
      end
      redis.call('HSET', KEYS[3], 'reason', REASONS[what], 'status', ARGV[i + 4])
    end
  end
end
redis.call('HSET', KEYS[1], 'window', string.format('%.6f', window))
if thresh < math.huge then
  redis.call('HSET', KEYS[1], 'thresh', string.format('%.6f', thresh), 'cut_at', string.format('%.6f', cut_at))
end
if record[4] then redis.call('HSET', KEYS[1], 't', string.format('%.6f', tokens)) end
if record[5] then redis.call('HSET', KEYS[1], 'r', string.format('%.6f', requests)) end
return settled

#!lua flags=allow-oom
-- Settles reservations of one (account, model): frees them, corrects the token bucket by what was really used, and lets the
-- outcomes teach window, rate and gates (adapt.lua). Idempotent by reservation id, always accepted.
--
-- KEYS[1..5] see limits.lua
-- ARGV[1] 1 if a request rate is given, else 0    ARGV[2] seconds a reservation lives unless renewed
-- ARGV[3] newest x-ratelimit-* headers, '' or: time in ms of their call, then limit, remaining and reset in seconds of requests,
--   the same of tokens, joined by commas, each may be empty
-- ARGV[4..] six values a reservation: id, what came of it, tokens to give back to the bucket (negative: to take), time in ms
--   at which it was let through, Retry-After in seconds or '', HTTP status or ''
--   what came of it: clean (an answer, good or bad), refused (429), failed, failed again (not the first failure of its job),
--   unreachable (nobody to connect to), key_refused, forbidden, payment_required, unused (never called), gone (broken off)
--
-- Returns the number of reservations that were still in flight.

--!include adapt.lua
--!include limits.lua

local now, rec, before, account, account_before = begin(tonumber(ARGV[2]))
local flying = redis.call('ZCARD', KEYS[2]) + redis.call('ZCARD', KEYS[3])
local settled = 0

for i = 4, #ARGV, 6 do
  local id, what, back, at = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]) / 1000
  local held = redis.call('ZREM', string.sub(id, 1, 1) == 'i' and KEYS[3] or KEYS[2], id)
  settled = settled + held
  local asked = tonumber(ARGV[i + 4])
  -- What the upstream asked for holds, even if the reservation has run out meanwhile.
  if held == 1 or asked then
    if held == 1 then
      if rec.tokens then rec.tokens = rec.tokens + back end
      if rec.requests and what == 'unused' then rec.requests = rec.requests + 1 end
      correct(rec, at, (what == 'unused' or what == 'refused') and -1 or 0, -back)
    end
    if what ~= 'unused' and what ~= 'gone' then
      local outcome = {
        what = what, at = at, now = now, flying = flying, left = flying - settled, asked = asked, status = ARGV[i + 5],
        given = ARGV[1] == '1' or rec.told_rpm ~= nil, minute = rec.sum_r or 0,
      }
      if not next_account(account, outcome) then next_record(rec, outcome) end
    end
  end
end

local said = {}
for value in string.gmatch(ARGV[3] .. ',', '([^,]*),') do said[#said + 1] = tonumber(value) or false end
-- What is told to an earlier call may come later.
if said[1] and said[1] / 1000 >= (rec.told_at or 0) then
  rec.told_at = said[1] / 1000
  for _, rate in ipairs({{2, 'told_rpm', 'requests'}, {5, 'told_tpm', 'tokens'}}) do
    local limit, remaining, reset = said[rate[1]], said[rate[1] + 1], said[rate[1] + 2]
    if limit and limit >= 1 then rec[rate[2]] = limit end
    if remaining and rec[rate[3]] then rec[rate[3]] = math.min(rec[rate[3]], remaining) end
    if remaining == 0 and reset and reset > 0 then
      rec.hold_until = math.max(rec.hold_until or 0, now + math.min(reset, 600))
    end
  end
end
rec.at = rec.at or now
save(KEYS[1], '', rec, before)
save(KEYS[5], 'gate_', account, account_before)
return settled

#!lua flags=allow-oom
-- One round of the reaper: what nobody holds any more becomes ready again. Bounded and idempotent.
--
-- KEYS[1] prefix    KEYS[2] rounds (hash: last = time of the last round, patient_until)
-- KEYS[3] heartbeats (zset: worker id -> time)    KEYS[4] deaths (zset: worker id -> time of its last heartbeat)
-- ARGV[1] leases to take back, at most    ARGV[2] batches with due retries to wake, at most
-- ARGV[3] seconds without a round after which live workers may have been unable to renew their leases, because this server
--   stood still or nobody could reach it    ARGV[4] seconds that they get then, before anything is taken
--
-- Returns {leases taken back, jobs of them, batches woken, seconds of a gap that was noticed now or 0}.
--
-- A lease that ran out is a crash of its worker, unless that lives: then it never heard of its claim. Calls it had begun are
-- on record in the lease (reserve.lua), and go to the job's attempts: they may have been billed.
--
-- When a slice saw CRASHES, its jobs that had been called go into quarantine (all of them, if none had), provided that these
-- were three quarters of all deaths of the last hour, or MANY: workers that die elsewhere are killed from outside. In
-- quarantine alone a crash counts against a job, and only if it had been called. The second one marks it as poison, or the
-- fifth while workers die in its absence too.

--!include common.lua

local CRASHES = 3
local MANY = 10
local ALONE = 2
local ALONE_IF_KILLED = 5
-- Deaths this close together are one event: a machine that went away.
local EVENT_S = 5
-- A worker whose last heartbeat is younger lives.
local LIVES_S = 5
local DEATHS_KEPT_S = 3600

local now_ = now()
local at = stamp(now_)
local rounds = redis.call('HMGET', KEYS[2], 'last', 'patient_until')
local last, patient_until = tonumber(rounds[1] or at), tonumber(rounds[2] or '0')
local gap = 0
if now_ - last >= tonumber(ARGV[3]) or now_ < last - 1 then
  gap = math.abs(now_ - last)
  patient_until = now_ + tonumber(ARGV[4])
end
-- A clock that was set back would have it wait for as long.
patient_until = math.min(patient_until, now_ + tonumber(ARGV[4]))
redis.call('HSET', KEYS[2], 'last', at, 'patient_until', stamp(patient_until))

-- How often workers died within the time we remember.
local function events()
  local count, before = 0, -math.huge
  local deaths = redis.call('ZRANGE', KEYS[4], 0, -1, 'WITHSCORES')
  for i = 2, #deaths, 2 do
    if tonumber(deaths[i]) - before > EVENT_S then count = count + 1 end
    before = tonumber(deaths[i])
  end
  return count
end

-- The time of a worker's last heartbeat, and whether it is dead; a dead one is remembered.
local function last_beat(worker)
  local beat = redis.call('ZSCORE', KEYS[3], worker)
  if beat and now_ - tonumber(beat) < LIVES_S then return beat, false end
  redis.call('ZADD', KEYS[4], 'NX', beat or at, worker)
  redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', stamp(now_ - DEATHS_KEPT_S))
  return beat or at, true
end

-- The job's attempts with the calls that its worker did not live to tell of; '' for none.
local function with_lost_calls(batch, index, token, calls, beat)
  if not calls then return '' end
  local lost = '{"at":' .. beat .. ',"latency_s":0.0,"verdict":"worker_lost","maybe_billed":true,"counted":false' ..
    (calls == '1' and '' or ',"times":' .. calls) .. '}'
  redis.call('HINCRBY', record(batch), 'attempts', calls)
  redis.call('SADD', of(batch, 'strays'), 'lost:' .. token .. ':' .. index)
  local before = redis.call('HGET', of(batch, 'history'), index)
  return before and string.sub(before, 1, -2) .. ',' .. lost .. ']' or '[' .. lost .. ']'
end

-- Where a job goes that was alone when its worker died.
local function judge(batch, index, called)
  local suspects = of(batch, 'suspects')
  local crashes = called and redis.call('HINCRBY', suspects, index, 1) or tonumber(redis.call('HGET', suspects, index) or '0')
  local killed = events() > CRASHES + crashes
  if crashes >= (killed and ALONE_IF_KILLED or ALONE) then
    make_ready(batch, {index}, -1)
  else
    quarantine(batch, index)
  end
end

local leases, taken = 0, 0
local most = now_ < patient_until and 0 or tonumber(ARGV[1])
for _, token in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'leases', '-inf', at, 'LIMIT', 0, most)) do
  local key = prefix .. 'lease:' .. token
  local lease = redis.call('HMGET', key, 'batch', 'indexes', 'crashes', 'worker', 'alone')
  leases = leases + 1
  if lease[1] and not is_gone(lease[1]) then
    local batch, crashes, ready, called = lease[1], tonumber(lease[3]), {}, {}
    local beat, crashed = last_beat(lease[4])
    if crashed and crashes >= 0 then crashes = crashes + 1 end
    local suspect = crashes >= MANY or (crashes >= CRASHES and 4 * crashes >= 3 * events())
    for index in string.gmatch(lease[2], '%d+') do
      if redis.call('HGET', of(batch, 'claims'), index) == token then
        taken = taken + 1
        local calls = redis.call('HGET', key, 'c' .. index)
        if give_back(batch, index, token, 0, with_lost_calls(batch, index, token, calls, beat)) then
          if lease[5] == '1' then
            judge(batch, index, crashed and calls)
          elseif calls and suspect then
            called[#called + 1] = index
          else
            ready[#ready + 1] = index
          end
        end
      end
    end
    if suspect and #called == 0 then ready, called = {}, ready end
    for _, index in ipairs(called) do quarantine(batch, index) end
    make_ready(batch, ready, crashes)
    close_if_over(batch)
    tell(batch)
  end
  redis.call('DEL', key)
  redis.call('ZREM', prefix .. 'leases', token)
end

local woken = wake_due(at, ARGV[2])

for _, batch in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'deadlines', '-inf', at, 'LIMIT', 0, 100)) do
  expire_if_due(batch, now_)
end
return {leases, taken, woken, tostring(gap)}

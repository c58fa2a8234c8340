-- What outcomes teach: the window, the learned rate and the gates. Pure: no call of Redis, no clock; not a script of its own.
--
-- A record is a table of numbers and texts. Of an (account, model):
--   window = calls in flight we dare; thresh = where its doubling ends (none before the first cut)
--   former, ramp, ramp_at = the window before a gate, which it doubles back to; the next step up and when the last was made;
--   ramped = of the next step, what answers have brought already
--   cut_at, cut_n, cut_r, cut_w = the last cut: when, calls in flight and refusals then, whether the window was cut by it;
--   cut_from, cut_thresh, cut_former = window, thresh and former before it
--   repeats = cuts in a row, none of which helped; fails = failures in a row
--   gate_reason, gate_status, gate_since, gate_until, gate_step_s = a shut gate, its next probe or end, the pause after that
--   opened_at = when the last gate opened
--   rate = calls a second, learned; ceiling = what the upstream let through; grown_at, rated_at = when it grew and was learned
--   met_at, met_n, met_same = when its rate limit was met, the calls let through in the minute before, how often as many
-- Of an account: gate_*, gate_refused_at and gate_asked_until, before which no call was asked for by a Retry-After.
--
-- An outcome is {what, at = when its call was let through, now, flying = calls in flight with it, left = without, asked = Retry-After in
-- seconds or nil, status, given = whether a request rate is given, minute = calls answered in the last minute}.

local FIRST_WINDOW = 16
local FAILS = 10
local CUTS = 3
-- Of a round so large a share, or a single one, may be refused by chance.
local CHANCE = 0.02
-- Seconds to the first probe of a gate, and between probes at most.
local PROBE_S = {
  refused = {1, 60}, outage = {1, 5}, key_refused = {0.5, 60}, forbidden = {0.5, 60}, payment_required = {0.5, 60},
}

local function shut(rec, reason, outcome, seconds)
  local first = PROBE_S[reason] and PROBE_S[reason][1] or 0
  rec.gate_reason, rec.gate_status = reason, outcome.status
  rec.gate_since, rec.gate_until = outcome.now, outcome.now + math.max(seconds or 0, first)
  rec.gate_step_s = 2 * first
end

-- A call that went through a shut gate: the next one only after a pause, which doubles.
local function probed(rec, now)
  rec.gate_until = now + rec.gate_step_s
  rec.gate_step_s = math.min(2 * rec.gate_step_s, PROBE_S[rec.gate_reason][2])
end

-- The gate opens: one call goes, then the window doubles back to its former size.
local function open(rec, now, flying)
  rec.gate_reason, rec.gate_status, rec.gate_since, rec.gate_until, rec.gate_step_s = nil, nil, nil, nil, nil
  rec.opened_at = now
  rec.former = math.max(rec.window or FIRST_WINDOW, rec.former or 0)
  -- What is still in flight from before was let in.
  rec.window = math.min(rec.former, flying + 1)
  rec.ramp, rec.ramp_at, rec.ramped, rec.fails, rec.repeats = 1, now, 0, 0, 0
end

local function ramp_ends(rec)
  rec.former, rec.ramp, rec.ramp_at, rec.ramped = nil, nil, nil, nil
end

-- Refusals come back at once, answers after half a minute perhaps: a second without a refusal is as good as a clean round, and
-- no more than that where rounds are as short.
local function climb(rec, now)
  if not rec.former or now - rec.ramp_at < 1 then return end
  rec.window = math.min(rec.former, rec.window + math.max(0, rec.ramp - (rec.ramped or 0)))
  rec.ramp, rec.ramp_at, rec.ramped = 2 * rec.ramp, now, 0
  if rec.window >= rec.former then ramp_ends(rec) end
end

-- The upstream may have met us with its rate limit. What it let through in the last minute is that limit if it was as much
-- the last two times: a limit stays the same, what a refusal by chance meets does not. Learned once a minute at most, so
-- that chance can't wear the rate down.
local function met_rate_limit(rec, outcome)
  local minute, now = outcome.minute, outcome.now
  if outcome.given or minute < 20 or (rec.met_at and now - rec.met_at < 10) then return end
  local same = rec.met_n and math.abs(minute - rec.met_n) <= math.max(1, 0.03 * rec.met_n)
  rec.met_same = same and (rec.met_same or 0) + 1 or 0
  if rec.met_same >= 2 and now - (rec.rated_at or -math.huge) >= 60 then
    rec.ceiling = minute / 60
    rec.rate = math.max(0.9 * rec.ceiling, 1 / 60)
    rec.grown_at, rec.rated_at = now, now
  end
  rec.met_at, rec.met_n = now, minute
end

local function of_last_cut(rec, outcome)
  return rec.cut_at and outcome.at <= rec.cut_at
end

-- One cut a round: later refusals of calls from before it only make it exact. A round of which most was refused met
-- something else than a limit of calls in flight, and leaves the window as it was. What may be chance does not end the first
-- doubling, or a limit would be learned from the few calls of a start. A limit is met with more of a round, or, where answers come
-- one by one, again before any call from after the cut has come back well: that is no chance.
local function cut(rec, outcome)
  if of_last_cut(rec, outcome) then
    rec.cut_r = rec.cut_r + 1
  else
    rec.repeats = (rec.repeats or 0) + 1
    rec.cut_at, rec.cut_n, rec.cut_r = outcome.now, outcome.flying, 1
    rec.cut_from, rec.cut_thresh, rec.cut_former = rec.window, rec.thresh, rec.former
    -- A window that is hardly used was not what met a limit.
    rec.cut_w = 2 * outcome.flying >= rec.window and 1 or 0
  end
  if rec.cut_w == 0 then return end
  local carried = rec.cut_n - rec.cut_r
  if rec.cut_r > rec.cut_n / 2 then
    rec.window, rec.thresh, rec.former = rec.cut_from, rec.cut_thresh, rec.cut_former
    rec.ramp, rec.ramp_at, rec.ramped = rec.former and 1, rec.former and outcome.now, rec.former and 0
  else
    rec.window = math.max(1, math.min(rec.window, carried - 1))
    local chance = not rec.cut_thresh and rec.repeats <= 1 and rec.cut_r <= math.max(1, CHANCE * rec.cut_n)
    rec.thresh = not chance and math.max(1, carried) or nil
    ramp_ends(rec)
  end
end

local function grow_rate(rec, now)
  if not rec.rate then return end
  local away = rec.rate / rec.ceiling
  local a_minute = (away < 0.9 or away > 1.2) and 2 or 1.05
  rec.rate = math.min(1e6, rec.rate * a_minute ^ (math.min(math.max(now - rec.grown_at, 0), 1) / 60))
  rec.grown_at = now
end

local function failed(rec, outcome, weight)
  rec.fails = (rec.fails or 0) + weight
  if rec.fails >= FAILS then shut(rec, 'outage', outcome) end
end

-- {what came, the gate then, what follows, in words, in code}; the first row that fits. 'stale' stands for every outcome
-- of a call from before the gate shut, and for what went wrong with one from before it opened.
local NEXT = {
  {'Retry-After', 'any', 'shut until then, at least; a 429 also cuts the window if that was in use, and may teach the rate',
    function(rec, outcome)
      if outcome.what == 'refused' then
        if not rec.gate_reason or of_last_cut(rec, outcome) then cut(rec, outcome) end
        met_rate_limit(rec, outcome)
      end
      local until_ = outcome.now + outcome.asked
      if not rec.gate_reason or until_ > rec.gate_until then
        local since = rec.gate_since
        shut(rec, 'retry_after', outcome, outcome.asked)
        rec.gate_since = since or rec.gate_since
      end
    end},
  {'stale', 'any', 'nothing, but that a refusal makes the cut of its round exact',
    function(rec, outcome)
      if outcome.what == 'refused' and of_last_cut(rec, outcome) then cut(rec, outcome) end
    end},
  {'clean', 'retry_after', 'nothing: the gate opens when it was said to', function() end},
  {'clean', 'shut', 'opens; window = in flight + 1, then doubling back, each clean round or each second, to its former size',
    function(rec, outcome) open(rec, outcome.now, outcome.left) end},
  {'refused', 'shut', 'nothing: the next probe goes after twice the pause, 1 s to 60 s', function() end},
  {'failed', 'shut', 'nothing: the next probe goes after twice the pause, 1 s to 5 s', function() end},
  {'unreachable', 'shut', 'nothing: the next probe goes after twice the pause, 1 s to 5 s', function() end},
  {'clean', 'open', 'window + 1 (doubling it each round) up to where it was cut, then + 1 in 10 rounds, while it is used; a learned rate grows',
    function(rec, outcome)
      rec.fails = 0
      if rec.cut_at and outcome.at > rec.cut_at then rec.repeats = 0 end
      grow_rate(rec, outcome.now)
      -- One more, because a place is kept for interactive jobs.
      if rec.window > 2 * (outcome.flying + 1) then return end
      if rec.window < (rec.former or rec.thresh or math.huge) then
        rec.window = rec.window + 1
        if rec.former then rec.ramped = (rec.ramped or 0) + 1 end
        if rec.former and rec.window >= rec.former then ramp_ends(rec) end
      else
        rec.window = rec.window + 0.1 / rec.window
      end
    end},
  {'refused', 'open', 'window = what the round carried without refusal, less one, if it was in use and carried half of the round, and, but for a single refusal or 2% of a round that is not the second in a row, the first doubling ends; the third cut in a row that does not help, or 5 refusals and more than half of the round, shut the gate (refused) and may teach the rate',
    function(rec, outcome)
      cut(rec, outcome)
      if rec.repeats >= CUTS or (rec.cut_r >= 5 and rec.cut_r > rec.cut_n / 2) then
        met_rate_limit(rec, outcome)
        shut(rec, 'refused', outcome)
      end
    end},
  {'failed', 'open', 'one more failure in a row, if it is the first of its job; 10 shut the gate (outage)',
    function(rec, outcome) failed(rec, outcome, 1) end},
  {'failed again', 'open', 'nothing: that may be the job', function() end},
  {'unreachable', 'open', 'counts as 3 failures: nobody was there, whatever the job', function(rec, outcome) failed(rec, outcome, 3) end},
}

local ACCOUNT = {
  {'401, 402, 403', 'any', 'shuts the account (key_refused, payment_required, forbidden): one call goes after 0.5 s, 1 s, 2 s, ... 60 s',
    function(rec, outcome)
      if not rec.gate_reason then shut(rec, outcome.what, outcome, outcome.asked) end
      rec.gate_reason, rec.gate_status, rec.gate_refused_at = outcome.what, outcome.status, outcome.now
      if outcome.asked then
        rec.gate_asked_until = math.max(rec.gate_asked_until or 0, outcome.now + outcome.asked)
        rec.gate_until = math.max(rec.gate_until, rec.gate_asked_until)
      end
    end},
  {'any other response', 'shut', 'opens, if its call went after the gate shut: whatever was wrong, it was not the key',
    function(rec, outcome)
      if outcome.at > rec.gate_since and outcome.now >= (rec.gate_asked_until or 0) then
        for name in pairs(rec) do rec[name] = nil end
      end
    end},
}

local function next_record(rec, outcome)
  rec.window = rec.window or FIRST_WINDOW
  local what, gate = outcome.what, rec.gate_reason and 'shut' or 'open'
  if outcome.asked and outcome.asked > 0 and what ~= 'clean' then
    what = 'Retry-After'
  elseif outcome.at <= (rec.gate_since or (what ~= 'clean' and rec.opened_at) or 0) then
    what = 'stale'
  end
  for _, row in ipairs(NEXT) do
    if row[1] == what and (row[2] == gate or row[2] == 'any' or row[2] == rec.gate_reason) then return row[4](rec, outcome) end
  end
end

-- Returns whether the outcome speaks of the account alone.
local function next_account(rec, outcome)
  if PROBE_S[outcome.what] and outcome.what ~= 'refused' then
    ACCOUNT[1][4](rec, outcome)
    return true
  elseif rec.gate_reason and (outcome.what == 'clean' or outcome.status ~= '') then
    ACCOUNT[2][4](rec, outcome)
  end
end

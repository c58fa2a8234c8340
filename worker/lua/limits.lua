-- Shared by `reserve` and `settle`: the records, the clock and the log of the last minute. Not a script of its own.
--
-- KEYS[1] limit record of the (account, model): what adapt.lua names, and at = time of the last call; requests, tokens =
--         levels of the buckets, filled = when; again = what looked lost after a gap was given time until then; share = what is left of the interactive share; sum_r, sum_t, first, last = sums and ends
--         of the log; want_i, want_by, want_b = until when interactive, bulk demand waits, and whose; want_c, want_c_by, want_c_n,
--         want_c_since = until when somebody waits for a place in flight, who, how many it has, and since when; big, big_by,
--         big_since, big_until = a request larger than the burst that saves up; told_rpm, told_tpm, told_at, hold_until = what
--         x-ratelimit-* headers said
-- KEYS[2] reservations of bulk jobs, KEYS[3] of interactive ones (zset: id -> time at which it counts as lost)
-- KEYS[4] log of the last minute (hash: 'r' or 't' and a quarter second's number -> requests, tokens started in it)
-- KEYS[5] gate of the account (hash: reason, status, since, until, step_s, refused_at, asked_until); absent while it is open

local BIN = 0.25
-- A start counts for a minute, and for the half second that a call may be late.
local KEPT = 60.5

local function load(key, head)
  local raw, rec, before = redis.call('HGETALL', key), {}, {}
  for i = 1, #raw, 2 do
    local name = head .. raw[i]
    before[name] = raw[i + 1]
    rec[name] = tonumber(raw[i + 1]) or raw[i + 1]
  end
  return rec, before
end

local function save(key, head, rec, before)
  local set, gone = {}, {}
  for name, value in pairs(rec) do
    local text = value
    if type(value) == 'number' then text = string.format(value % 1 == 0 and '%.0f' or '%.6f', value) end
    if before[name] ~= text then set[#set + 1] = string.sub(name, #head + 1); set[#set + 1] = text end
  end
  for name in pairs(before) do
    if rec[name] == nil then gone[#gone + 1] = string.sub(name, #head + 1) end
  end
  if #set > 0 then redis.call('HSET', key, unpack(set)) end
  if #gone > 0 then redis.call('HDEL', key, unpack(gone)) end
end

-- Adds to the log's quarter second of this time.
local function note(rec, at, requests, tokens)
  local bin = math.max(math.floor(at / BIN), rec.first or 0)
  rec.first, rec.last = rec.first or bin, math.max(rec.last or bin, bin)
  rec.sum_r, rec.sum_t = (rec.sum_r or 0) + requests, (rec.sum_t or 0) + tokens
  local number = string.format('%.0f', bin)
  if requests ~= 0 then redis.call('HINCRBY', KEYS[4], 'r' .. number, requests) end
  if tokens ~= 0 then redis.call('HINCRBY', KEYS[4], 't' .. number, string.format('%.0f', tokens)) end
end

-- Corrects what was noted then, unless it has left the log.
local function correct(rec, at, requests, tokens)
  if rec.first and math.floor(at / BIN) >= rec.first then note(rec, math.min(at, rec.last * BIN), requests, tokens) end
end

local function forget(rec)
  redis.call('DEL', KEYS[4])
  rec.first, rec.last, rec.sum_r, rec.sum_t = nil, nil, 0, 0
end

-- Takes out of the log what started over a minute ago.
local function expire(rec, now)
  local stop = math.floor((now - KEPT) / BIN) - 1
  if not rec.first or rec.first > stop then return end
  if rec.last <= stop then return forget(rec) end
  local names = {}
  for bin = rec.first, stop do
    names[#names + 1] = 'r' .. string.format('%.0f', bin)
    names[#names + 1] = 't' .. string.format('%.0f', bin)
  end
  for i, value in ipairs(redis.call('HMGET', KEYS[4], unpack(names))) do
    if value then
      local sum = i % 2 == 1 and 'sum_r' or 'sum_t'
      rec[sum] = rec[sum] - tonumber(value)
    end
  end
  redis.call('HDEL', KEYS[4], unpack(names))
  rec.first = stop + 1
end

-- The server's clock was set back: all that points into the future would stand there for as long. What was started counts
-- as started now, so no limit is exceeded for it.
local function set_back(rec, account, now, lost_s)
  local requests, tokens, at = rec.sum_r or 0, rec.sum_t or 0, rec.at
  rec.at = now
  forget(rec)
  note(rec, now, requests, tokens)
  for _, name in ipairs({'want_i', 'want_b', 'want_c', 'want_c_since', 'big_since', 'big_until', 'hold_until', 'ramp_at', 'cut_at', 'gate_since',
    'opened_at', 'filled', 'told_at', 'grown_at', 'rated_at', 'met_at'}) do
    if rec[name] then rec[name] = math.min(rec[name], now) end
  end
  for _, gated in ipairs({rec, account}) do
    if gated.gate_until then
      gated.gate_since = math.min(gated.gate_since, now)
      gated.gate_until = math.min(gated.gate_until, now + math.max(60, gated.gate_until - at))
    end
  end
  for _, key in ipairs({KEYS[2], KEYS[3]}) do
    for _, id in ipairs(redis.call('ZRANGE', key, 0, -1)) do redis.call('ZADD', key, now + lost_s, id) end
  end
end

-- The time, and both records brought up to it.
local function begin(lost_s)
  local t = redis.call('TIME')
  local now = tonumber(t[1]) + tonumber(t[2]) / 1000000
  local rec, before = load(KEYS[1], '')
  local account, account_before = load(KEYS[5], 'gate_')
  if rec.at and now < rec.at - 1 then set_back(rec, account, now, lost_s) end
  expire(rec, now)
  return now, rec, before, account, account_before
end

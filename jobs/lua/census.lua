#!lua flags=no-writes
-- Counts the jobs of batches, some batches in one call: what the metrics show. Reads only.
--
-- KEYS[1] prefix
-- ARGV[1] rank of the first batch to look at    ARGV[2] how many
-- ARGV[3] '': of the open batches, the oldest first; or a lane: of those with ready work in it, each upstream's next first
--
-- Returns {batches looked at, then for each lane {its name, jobs queued, running, ready: those queued that may be claimed now,
-- time of the submit of the oldest batch that has some, or ''}}.

--!include common.lua

local at = stamp(now())
local first = tonumber(ARGV[1])
local last = first + tonumber(ARGV[2])
local lists = {}
if ARGV[3] == '' then
  lists[1] = prefix .. 'open'
else
  for _, name in ipairs(redis.call('SMEMBERS', prefix .. 'lanes')) do
    if string.match(name, '^(%a+):') == ARGV[3] then lists[#lists + 1] = prefix .. 'lane:' .. name end
  end
end

-- Each list has its share of the ranks, so that however many there are, none is missed and no batch comes twice.
local batches = {}
for _, list in ipairs(lists) do
  local share = redis.call('ZRANGE', list, math.ceil(first / #lists), math.ceil(last / #lists) - 1)
  for _, batch in ipairs(share) do batches[#batches + 1] = batch end
end

local lanes = {}
local found = {#batches}

for _, batch in ipairs(batches) do
  local b = redis.call('HMGET', record(batch), 'lane', 'state', 'created_at', 'total', 'succeeded', 'failed', 'cancelled',
    'expired')
  if b[1] then
    local lane = lanes[b[1]]
    if not lane then
      lane = {b[1], 0, 0, 0, ''}
      lanes[b[1]] = lane
      found[#found + 1] = lane
    end
    local running = redis.call('HLEN', of(batch, 'claims'))
    local queued = tonumber(b[4]) - running
    for i = 5, 8 do queued = queued - tonumber(b[i]) end
    lane[2], lane[3] = lane[2] + queued, lane[3] + running
    local ready = b[2] == 'running' and queued - redis.call('ZCOUNT', of(batch, 'retries'), '(' .. at, '+inf') or 0
    if ready > 0 then
      lane[4] = lane[4] + ready
      if lane[5] == '' or tonumber(b[3]) < tonumber(lane[5]) then lane[5] = b[3] end
    end
  end
end
return found

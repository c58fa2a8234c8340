#!lua flags=no-writes
-- Counts the jobs of open batches, some batches in one call: what the metrics show. Reads only.
--
-- KEYS[1] prefix
-- ARGV[1] rank of the first open batch to look at, the oldest first    ARGV[2] how many
--
-- Returns {batches looked at, then for each lane {its name, jobs queued, running, ready: those queued that may be claimed now,
-- time of the submit of the oldest batch that has some, or ''}}.

--!include common.lua

local at = stamp(now())
local first = tonumber(ARGV[1])
local batches = redis.call('ZRANGE', prefix .. 'open', first, first + tonumber(ARGV[2]) - 1)
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

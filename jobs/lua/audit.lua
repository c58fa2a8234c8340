#!lua flags=allow-oom
-- Looks whether all that is unfinished of a batch is where somebody finds it, and puts it there. Every script leaves it so;
-- this is for what a script could not foresee, such as keys that somebody deleted. Bounded and idempotent.
--
-- KEYS[1] prefix
-- ARGV[1] batch id    ARGV[2] claims, or jobs, to look at, at most
--
-- Returns the number of jobs that were found lost and are ready again.

--!include common.lua

local batch, most = ARGV[1], tonumber(ARGV[2])
if is_gone(batch) then return 0 end
local b = redis.call('HMGET', record(batch), 'state', 'total', 'cursor', 'closing', 'created_at')
if b[1] == 'finished' then return 0 end
let_open(batch, b[2], b[5])  -- on each list, also where an older mimoq made it
local total, cursor = tonumber(b[2]), tonumber(b[3])
local found = 0

-- A sample, so that every round sees others: a job that is claimed by a lease that is not.
local claims = redis.call('HRANDFIELD', of(batch, 'claims'), most, 'WITHVALUES')
for i = 1, #claims, 2 do
  local index, token = claims[i], claims[i + 1]
  if redis.call('ZSCORE', prefix .. 'leases', token) == false then
    found = found + 1
    redis.call('DEL', prefix .. 'lease:' .. token)
    if give_back(batch, index, token, 0, '') then make_ready(batch, {index}, 0) end
  end
end

if b[4] ~= '' then
  -- What nobody holds is swept; from the beginning, if all was.
  if redis.call('SISMEMBER', prefix .. 'closing', batch) == 0 and redis.call('HLEN', of(batch, 'claims')) == 0
    and not close_if_over(batch) then
    redis.call('HSET', record(batch), 'swept', 0)
    redis.call('SADD', prefix .. 'closing', batch)
  end
  return found
end

local waiting = redis.call('LLEN', of(batch, 'ready')) + redis.call('LLEN', of(batch, 'quarantine'))
  + redis.call('ZCARD', of(batch, 'retries')) + redis.call('HLEN', of(batch, 'claims'))
if waiting == 0 and cursor >= total and not close_if_over(batch) then
  -- The claim passes over what has ended, so the cursor may go back to the first that has not.
  local bytes = redis.call('GET', of(batch, 'states')) or ''
  local lost = string.find(bytes, '\0', 1, true)
  redis.call('HSET', record(batch), 'cursor', lost and lost - 1 or math.min(#bytes, total))
  found = found + 1
end
if redis.call('LLEN', of(batch, 'ready')) > 0 or tonumber(redis.call('HGET', record(batch), 'cursor')) < total then
  wake(batch)
end
local retry = redis.call('ZRANGE', of(batch, 'retries'), 0, 0, 'WITHSCORES')
if #retry > 0 then redis.call('ZADD', prefix .. 'due', 'LT', retry[2], batch) end
if b[1] == 'running' then offer_suspects(batch) end
return found

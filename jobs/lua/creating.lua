-- Shared by the scripts that create batches; not a script of its own. Needs common.lua.

-- What stands in the way of a new batch: {'exists', id} where a batch of this id or identity is there with this content,
-- {'conflict', id} where it has another, nil where there is none. A batch of this very id is this submit, made again by
-- somebody who does not know whether it arrived.
local function there_before(id, identity, content)
  for _, before in ipairs({id, identity ~= '' and redis.call('GET', prefix .. 'identity:' .. identity) or nil}) do
    if redis.call('EXISTS', record(before)) == 1 then
      return {redis.call('HGET', record(before), 'content') == content and 'exists' or 'conflict', before}
    end
  end
end

-- Seconds that a call made again finds what it made the first time, and after which whoever made it is taken not to have
-- heard of it, if nobody has said so (heard.lua): an answer takes less.
local MADE_S = 900
local UNHEARD_S = 0.25

-- The batch that a call of this digest has made, where `again` says that it is that call made again: of several that nobody has
-- heard of the oldest, but none that was stopped.
local function made_before(digest, again)
  if digest == '' or again ~= '1' then return end
  local at = now()
  local made = redis.call('ZRANGEBYSCORE', prefix .. 'made:' .. digest, stamp(at - MADE_S), stamp(at - UNHEARD_S), 'LIMIT', 0, 100)
  for _, id in ipairs(made) do
    local o = redis.call('HMGET', of(id, 'openai'), 'created_at', 'failed_at', 'cancelled_at', 'cancelling_at')
    local closing = redis.call('HGET', record(id), 'closing')
    if (closing or o[1]) and (closing or '') == '' and not (o[2] or o[3] or o[4]) then return {'exists', id} end
  end
end

-- `key` is the hash that tells of the batch.
local function remember_made(digest, id, key)
  if digest == '' then return end
  local made = prefix .. 'made:' .. digest
  redis.call('ZREMRANGEBYSCORE', made, '-inf', stamp(now() - MADE_S))
  redis.call('ZADD', made, stamp(now()), id)
  redis.call('EXPIRE', made, MADE_S)
  redis.call('HSET', key, 'made', digest)
end

-- Makes the record of a batch whose requests lie where they belong, and lets it be found. `new` has id, lane, label, total,
-- size, identity, content, ttl, tenant, deadline (seconds from now, '' for none), deadline_at (unix seconds, '' or nil), protocol, answered (states of jobs answered before,
-- '' for none), succeeded and failed (how many of these), and further fields of the record in turn.
local function create_batch(new)
  local id, at = new.id, stamp(now())
  if new.identity ~= '' then redis.call('SET', prefix .. 'identity:' .. new.identity, id) end
  redis.call('HSET', record(id), 'state', 'running', 'lane', new.lane, 'label', new.label, 'total', new.total,
    'size', new.size, 'identity', new.identity, 'content', new.content, 'ttl', new.ttl, 'tenant', new.tenant, 'cursor', 0,
    'created_at', at, 'closing', '', 'swept', 0, 'succeeded', new.succeeded, 'failed', new.failed, 'cancelled', 0,
    'expired', 0, 'answered', new.succeeded + new.failed, 'attempts', 0, 'prompt_tokens', 0, 'completion_tokens', 0,
    'reasoning_tokens', 0, 'cached_tokens', 0, 'total_tokens', 0, 'late_answers', 0)
  if #new.further > 0 then redis.call('HSET', record(id), unpack(new.further)) end
  if new.answered ~= '' then redis.call('SET', of(id, 'states'), new.answered) end
  redis.call('ZADD', prefix .. 'batches', at, id)
  redis.call('SADD', prefix .. 'tenants', new.tenant)
  redis.call('ZADD', prefix .. 'tenant:' .. new.tenant .. ':batches', at, id)
  if new.protocol ~= '' then
    redis.call('ZADD', prefix .. 'tenant:' .. new.tenant .. ':' .. new.protocol, 'NX', at, id)
  end
  let_open(id, new.total, at)
  local deadline = tonumber(new.deadline_at) or new.deadline ~= '' and now() + tonumber(new.deadline)
  if deadline then
    deadline = stamp(deadline)
    redis.call('ZADD', prefix .. 'deadlines', deadline, id)
    redis.call('HSET', record(id), 'deadline_at', deadline)
  end
  -- Its first jobs are next, whatever else waits: what is wrong with all of them shows at once.
  if not close_if_over(id) then wake(id, new.total ~= '1') end
end

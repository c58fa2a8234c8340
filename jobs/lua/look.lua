#!lua flags=no-writes
-- Looks at jobs of any batches, those that were asked for at about the same time together.
--
-- KEYS[1]  prefix
-- ARGV[1]  number of fields of a batch's record that are told    ARGV[2..] these fields
-- ARGV[..] for each job: its tenant, batch id, index
--
-- Returns for each job false where that tenant has no such job, else {state byte ('' while it has not ended), whether it is
-- claimed, time before which it is not called or '', JSON of its attempts so far or '', its result or '' (only of one that has
-- ended, and only where results live here), its compressed block where that alone tells what it is, then the record's fields}.

--!include common.lua

local count = tonumber(ARGV[1])
local fields = {unpack(ARGV, 2, count + 1)}

local found = {}
for i = count + 2, #ARGV, 3 do
  local tenant, batch, index = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local b = redis.call('HMGET', record(batch), 'total', 'tenant', 'size', 'endpoint')
  if not b[1] or (b[2] or '') ~= tenant or tonumber(index) >= tonumber(b[1]) then
    found[#found + 1] = false
  else
    local state = redis.call('GETRANGE', of(batch, 'states'), index, index)
    if state == '\0' then state = '' end
    local answer, block, claimed, not_before, attempts = '', '', 0, '', ''
    if state ~= '' then
      answer = redis.call('GET', 'celery-task-meta-' .. batch .. '-' .. index) or ''
    else
      claimed = redis.call('HEXISTS', of(batch, 'claims'), index)
      not_before = redis.call('ZSCORE', of(batch, 'retries'), index) or ''
      attempts = redis.call('HGET', of(batch, 'history'), index) or ''
    end
    -- The record of a batch of one says it itself.
    if not b[4] and (state ~= 's' and state ~= 'f' or answer == '') then
      block = redis.call('HGET', of(batch, 'requests'), string.format('%d', math.floor(tonumber(index) / tonumber(b[3])))) or ''
    end
    local item = {state, claimed, not_before, attempts, answer, block}
    for _, value in ipairs(redis.call('HMGET', record(batch), unpack(fields))) do item[#item + 1] = value or '' end
    found[#found + 1] = item
  end
end
return found

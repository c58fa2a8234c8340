#!lua flags=allow-oom
-- Takes jobs of one batch back from their holder, who did not end them.
--
-- KEYS[1] prefix
-- ARGV[1] batch id
-- ARGV[2..] five values a job: index, fencing token, seconds before it may be called again (0: ready at once), JSON of its
--   attempts so far ('' for none), what its calls under this token cost (common.lua: SPENT; '' for no call)
--
-- Returns the number of jobs that are ready at once. Jobs that the token does not hold are passed over, but what their
-- calls cost is counted, once.

--!include common.lua

local batch = ARGV[1]
local blocks, order = {}, {}
local size = tonumber(redis.call('HGET', record(batch), 'size') or '1')
local ready, spent = 0, {}
for i = 2, #ARGV, 5 do
  local index, token = ARGV[i], ARGV[i + 1]
  if ARGV[i + 4] ~= '' and tells_first(batch, index, token) then add_spent(spent, ARGV[i + 4], batch, index, token) end
  if redis.call('HGET', of(batch, 'claims'), index) == token then
    if give_back(batch, index, token, tonumber(ARGV[i + 2]), ARGV[i + 3]) then
      local block = math.floor(tonumber(index) / size)
      if not blocks[block] then
        blocks[block] = {}
        order[#order + 1] = block
      end
      table.insert(blocks[block], index)
      ready = ready + 1
    end
  end
end
count_spent(batch, spent)
for _, block in ipairs(order) do make_ready(batch, blocks[block], 0) end
close_if_over(batch)
tell(batch)
return ready

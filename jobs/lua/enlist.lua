#!lua
-- Creates batches of one job each, those that came at about the same time together: what bulk gets by its size.
--
-- KEYS[1]  prefix
-- ARGV[1]  jobs in a block of any batch; a batch of one has one block
-- ARGV[2..] for each batch: its id, lane, label, identity digest or '', digest of the content or '', retention in seconds,
--   deadline in seconds from now or '', tenant, digest under which a waiting call that is made again finds this job or '',
--   seconds that this is remembered, whether this is such a call (it makes no job if it finds one), number of fields of its requests, these fields (name and value in turn), number of
--   further fields of the record, these (name and value in turn)
--
-- Returns {word, batch id} a batch, as create.lua does, and the time with 'created'.

--!include common.lua
--!include creating.lua
--!include joining.lua

local replies, i = {}, 2
while i <= #ARGV do
  local id, lane, label, identity, content, ttl, deadline, tenant, join, join_s, again = unpack(ARGV, i, i + 10)
  local requests = i + 12
  local further = requests + 2 * tonumber(ARGV[i + 11]) + 1
  i = further + 2 * tonumber(ARGV[further - 1])
  local found = again == '1' and joined(join)
  local before = found and {'exists', found} or there_before(id, identity, content)
  if before then
    replies[#replies + 1] = before
  else
    redis.call('HSET', of(id, 'requests'), unpack(ARGV, requests, further - 2))
    create_batch({id = id, lane = lane, label = label, total = '1', size = ARGV[1], identity = identity, content = content,
      ttl = ttl, deadline = deadline, tenant = tenant, answered = '', succeeded = '0', failed = '0', protocol = '',
      further = {unpack(ARGV, further, i - 1)}})
    if join ~= '' then
      redis.call('ZADD', prefix .. 'joins:' .. join, stamp(now()), id)
      redis.call('EXPIRE', prefix .. 'joins:' .. join, join_s)
    end
    replies[#replies + 1] = {'created', id, stamp(now())}
  end
end
return replies

-- Be a consumer of the group for a while longer. Makes streams and group where the server has none (any more).
-- KEYS: the stream of each class, the lease.  ARGV: group, lease (ms).
redis.call('SET', KEYS[#KEYS], 1, 'PX', ARGV[2])
for k = 1, #KEYS - 1 do
  redis.pcall('XGROUP', 'CREATE', KEYS[k], ARGV[1], 0, 'MKSTREAM')  -- an error means that it exists
end

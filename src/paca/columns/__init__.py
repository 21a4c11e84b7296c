"""What is trained: choosing columns, holding them in a weight, writing, parking and sharding them."""

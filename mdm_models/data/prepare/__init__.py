"""`mdm prepare`: from an index of URLs, a folder of pictures or npm tarballs to the shards that training reads."""

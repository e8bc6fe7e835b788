"""`mdm prepare`: from a list of URLs, a folder of pictures or npm tarballs to the shards that training reads."""

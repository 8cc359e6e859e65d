chmod 700 a/b

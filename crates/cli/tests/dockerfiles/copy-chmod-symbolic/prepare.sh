chmod 644 a d/x d/s/y
chmod 755 d/s

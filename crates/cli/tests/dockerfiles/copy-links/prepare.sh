ln -s real link
ln -s f d/in
ln -s /etc/passwd d/out
ln d/f d/hard

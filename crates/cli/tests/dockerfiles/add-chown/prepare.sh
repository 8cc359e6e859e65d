tar --owner=3 --group=4 --mtime=@1 -cf a.tar x
rm -r x

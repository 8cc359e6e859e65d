chmod 700 x
tar --owner=3 --group=4 --mtime=@1 -cf a.tar x
gzip -nk a.tar
bzip2 -k a.tar
xz -k a.tar
zstd -qk a.tar
echo plain | gzip -n > plain.gz
rm -r x

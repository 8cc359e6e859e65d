//! Writes database files in the format of Go's bbolt library, whole ones and broken ones.

use std::collections::BTreeMap;

/// What a key has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// Bytes.
    Value(Vec<u8>),
    /// More keys.
    Bucket(Tree),
}

/// Keys in order.
pub type Tree = BTreeMap<Vec<u8>, Node>;

const HEADER: usize = 16;

/// Lays a file out. Pages are never split as Go's library would: what matters is that every form occurs.
struct Writer {
    page_bytes: usize,
    /// From page 2 on.
    pages: Vec<u8>,
    /// Keys in one leaf, and children of one branch.
    fan: usize,
}

/// The file that holds `tree`, with pages of `page_bytes` and at most `fan` elements in each. There is no list of free
/// pages, as with `NoFreelistSync`.
///
/// # Panics
/// If a tree is too large for its numbers.
pub fn file(tree: &Tree, page_bytes: usize, fan: usize) -> Vec<u8> {
    let mut writer = Writer { page_bytes, pages: Vec::new(), fan: fan.max(2) };
    let root = writer.bucket(tree);
    let mut out = Vec::new();
    for transaction in [7u64, 8] {
        let count = 2 + writer.pages.len() / page_bytes;
        // The older of the two knows of no key.
        let root = if transaction == 8 { root } else { 0 };
        out.extend(meta(page_bytes, root, count as u64, transaction));
    }
    out.extend(writer.pages);
    out
}

/// A meta page.
fn meta(page_bytes: usize, root: u64, count: u64, transaction: u64) -> Vec<u8> {
    let mut meta = Vec::new();
    for word in [0xED0C_DAED, 2, u32::try_from(page_bytes).expect("because pages are small"), 0] {
        meta.extend(word.to_le_bytes());
    }
    for word in [root, 0, u64::MAX, count, transaction] {
        meta.extend(word.to_le_bytes());
    }
    let sum = meta
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
    meta.extend(sum.to_le_bytes());
    let mut page = header(transaction % 2, 4, 0, 0);
    page.extend(meta);
    page.resize(page_bytes, 0);
    page
}

fn header(id: u64, flags: u16, count: usize, overflow: usize) -> Vec<u8> {
    let mut header = id.to_le_bytes().to_vec();
    header.extend(flags.to_le_bytes());
    header.extend(u16::try_from(count).expect("because fans are small").to_le_bytes());
    header.extend(u32::try_from(overflow).expect("because files are small").to_le_bytes());
    header
}

impl Writer {
    /// Writes a bucket's pages; the number of its root.
    fn bucket(&mut self, tree: &Tree) -> u64 {
        let elements: Vec<(u32, Vec<u8>, Vec<u8>)> = tree.iter().map(|(key, node)| self.element(key, node)).collect();
        let mut level: Vec<(Vec<u8>, u64)> = Vec::new();
        for part in elements.chunks(self.fan) {
            level.push((part[0].1.clone(), self.leaf(part)));
        }
        if level.is_empty() {
            return self.leaf(&[]);
        }
        while level.len() > 1 {
            let above: Vec<_> = level.chunks(self.fan).map(|part| (part[0].0.clone(), self.branch(part))).collect();
            level = above;
        }
        level[0].1
    }

    fn element(&mut self, key: &[u8], node: &Node) -> (u32, Vec<u8>, Vec<u8>) {
        match node {
            Node::Value(value) => (0, key.to_vec(), value.clone()),
            Node::Bucket(tree) => {
                // As Go's library: small ones without buckets in them stand in place.
                let plain = tree.values().all(|node| matches!(node, Node::Value(_)));
                let values: Vec<_> = tree.iter().map(|(key, node)| self.element_if(plain, key, node)).collect();
                let inline = leaf_bytes(0, &values.into_iter().flatten().collect::<Vec<_>>());
                let mut value = Vec::new();
                if plain && inline.len() <= self.page_bytes / 4 {
                    value.extend([0; 16]);
                    value.extend(inline);
                } else {
                    value.extend(self.bucket(tree).to_le_bytes());
                    value.extend([0; 8]);
                }
                (1, key.to_vec(), value)
            }
        }
    }

    fn element_if(&mut self, plain: bool, key: &[u8], node: &Node) -> Option<(u32, Vec<u8>, Vec<u8>)> {
        plain.then(|| self.element(key, node))
    }

    fn next(&self) -> u64 {
        2 + (self.pages.len() / self.page_bytes) as u64
    }

    fn put(&mut self, mut page: Vec<u8>) -> u64 {
        let id = self.next();
        let overflow = page.len().div_ceil(self.page_bytes) - 1;
        page[..8].copy_from_slice(&id.to_le_bytes());
        page[12..16].copy_from_slice(&u32::try_from(overflow).expect("because files are small").to_le_bytes());
        page.resize((1 + overflow) * self.page_bytes, 0);
        self.pages.extend(page);
        id
    }

    fn leaf(&mut self, elements: &[(u32, Vec<u8>, Vec<u8>)]) -> u64 {
        let page = leaf_bytes(0, elements);
        self.put(page)
    }

    fn branch(&mut self, children: &[(Vec<u8>, u64)]) -> u64 {
        let mut page = header(0, 1, children.len(), 0);
        let mut at = HEADER + HEADER * children.len();
        for (place, (key, child)) in children.iter().enumerate() {
            page.extend(u32::try_from(at - HEADER * (1 + place)).expect("because pages are small").to_le_bytes());
            page.extend(u32::try_from(key.len()).expect("because keys are small").to_le_bytes());
            page.extend(child.to_le_bytes());
            at += key.len();
        }
        children.iter().for_each(|(key, _)| page.extend(key));
        self.put(page)
    }
}

fn leaf_bytes(id: u64, elements: &[(u32, Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let mut page = header(id, 2, elements.len(), 0);
    let mut at = HEADER + HEADER * elements.len();
    for (place, (flags, key, value)) in elements.iter().enumerate() {
        for word in [*flags as usize, at - HEADER * (1 + place), key.len(), value.len()] {
            page.extend(u32::try_from(word).expect("because pages are small").to_le_bytes());
        }
        at += key.len() + value.len();
    }
    for (_, key, value) in elements {
        page.extend(key);
        page.extend(value);
    }
    page
}

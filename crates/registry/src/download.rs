//! Files that are no registry's: plain downloads, with neither credentials nor a digest to check them by.

use std::fmt;
use std::io::Read;

use ureq::http::{HeaderName, Method, header};

use crate::http::{Payload, check_target, location, shown};
use crate::{Client, RegistryError};

/// Redirects that a download follows, as curl and browsers follow tens and Go's client ten.
const REDIRECTS_MAX: u32 = 10;

/// What became of a download.
pub enum Download {
    /// The server says that it is still what the validators name.
    NotModified,
    /// It comes.
    Body {
        /// The bytes. A body that stops early is an error of the reader; a long one ends with the reader's patience.
        bytes: Box<dyn Read>,
        /// `ETag`
        etag: Option<String>,
        /// `Last-Modified`
        last_modified: Option<String>,
    },
}

impl fmt::Debug for Download {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotModified => f.write_str("NotModified"),
            Self::Body { etag, last_modified, .. } => {
                f.debug_struct("Body").field("etag", etag).field("last_modified", last_modified).finish_non_exhaustive()
            }
        }
    }
}

impl Client {
    /// Asks for a file, and again if the connection breaks before the answer. With validators (`ETag`, `Last-Modified`) of
    /// what is here already, it need not come again.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`] for 404 and 410, [`RegistryError::Status`] for any other status that is not success,
    /// [`RegistryError::Connection`], [`RegistryError::Redirect`], [`RegistryError::Stopped`].
    pub fn download(
        &self,
        url: &str,
        etag: Option<&str>,
        last_modified: Option<&str>,
    ) -> Result<Download, RegistryError> {
        let validators = [(header::IF_NONE_MATCH, etag), (header::IF_MODIFIED_SINCE, last_modified)];
        let headers: Vec<(HeaderName, String)> =
            validators.into_iter().filter_map(|(name, value)| Some((name, value?.to_owned()))).collect();
        self.patiently(|_| self.download_once(url, &headers))
    }

    fn download_once(&self, url: &str, headers: &[(HeaderName, String)]) -> Result<Download, RegistryError> {
        let mut url = url.to_owned();
        for _ in 0..=REDIRECTS_MAX {
            let response = self.raw(Method::GET, &url, headers, Payload::Nothing)?;
            let said = |name| response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
            match response.status().as_u16() {
                200 => {
                    let (etag, last_modified) = (said(header::ETAG), said(header::LAST_MODIFIED));
                    let bytes = Box::new(response.into_body().into_reader());
                    return Ok(Download::Body { bytes, etag, last_modified });
                }
                304 if !headers.is_empty() => return Ok(Download::NotModified),
                301 | 302 | 303 | 307 | 308 => {
                    let to = location(&url, &response)?;
                    check_target(&url, &to).map_err(|why| RegistryError::Redirect {
                        from: shown(&url),
                        to: shown(&to),
                        why,
                    })?;
                    url = to;
                }
                404 | 410 => return Err(RegistryError::NotFound { url: shown(&url), detail: String::new() }),
                status => {
                    let (url, detail, retry_after) = (shown(&url), String::new(), None);
                    return Err(RegistryError::Status { url, status, detail, retry_after });
                }
            }
        }
        Err(RegistryError::Redirect { from: shown(&url), to: String::new(), why: "there were ten before it" })
    }
}

"""Marks pictures as made by a model: the XMP packet that holds IPTC's DigitalSourceType. Pure."""

from __future__ import annotations

from enum import StrEnum

_VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"
# An XMP packet by ISO 16684-1; the property is "Digital Source Type" of the IPTC Photo Metadata Standard.
_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    "<Iptc4xmpExt:DigitalSourceType>{uri}</Iptc4xmpExt:DigitalSourceType>"
    '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


class DigitalSourceType(StrEnum):
    """How a picture came to be, in the words of IPTC's NewsCodes."""

    GENERATED = "trainedAlgorithmicMedia"
    EDITED = "compositeWithTrainedAlgorithmicMedia"

    @property
    def uri(self) -> str:
        """The term's address in IPTC's vocabulary, which is what XMP holds."""
        return _VOCABULARY + self.value


def source_type_of(*, has_input_image: bool) -> DigitalSourceType:
    """The type of a picture drawn from words alone, or from a picture the caller sent."""
    return DigitalSourceType.EDITED if has_input_image else DigitalSourceType.GENERATED


def xmp_packet(source_type: DigitalSourceType) -> str:
    """The XMP packet of a picture of that type, about 450 characters."""
    return _PACKET.format(uri=source_type.uri)

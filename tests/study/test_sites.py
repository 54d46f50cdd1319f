import pytest

from bids_dgmseg.study.sites import name_scanner


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"InstitutionName": "Z\u00fcrich\n\tHospital ", "Manufacturer": "GE\t"}, "Z\u00fcrich Hospital GE"),
        ({"Manufacturer": ["a"], "ManufacturersModelName": {"x": 1}, "InstitutionName": True}, None),
        ({"Manufacturer": ["a"], "ManufacturersModelName": "Prisma"}, "Prisma"),
        ({"Manufacturer": "Siemens", "DeviceSerialNumber": 45153}, "Siemens 45153"),
        ({"Manufacturer": " \n"}, None),
        ({"MagneticFieldStrength": "2.89"}, None),
        ({"InstitutionName": "Bern", "MagneticFieldStrength": "2.89"}, "Bern 3T"),
        ({"Manufacturer": "Siemens", "MagneticFieldStrength": float("inf")}, "Siemens"),
        ({"Manufacturer": "Siemens", "MagneticFieldStrength": [3]}, "Siemens"),
    ],
)
def test_a_scanner_is_named_in_one_line_of_words(fields, name):
    assert name_scanner(fields) == name
